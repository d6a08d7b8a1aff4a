"""checkpoint-<step>/: all that a run needs to go on bit for bit. Tensors and JSON, no pickle.

    trained.safetensors     the trained parameters, and what else the method added to the model
    optimizer.safetensors   the optimizer's state
    state.json              the loop's state
    MANIFEST.json           sha256 of the three; a checkpoint without, or that does not match, is passed over

Random numbers need no state: those of a step follow from the seed and the step's number.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_run.errors import RunError
from peft_run.files import new_folder, read_json, sha256, write_json

if TYPE_CHECKING:
    import torch

    from peft_run.console import Console
    from peft_run.run import Run

TRAINED, OPTIMIZER, STATE, MANIFEST = "trained.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"


def save(run: Run, step: int, trained: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], state: Any) -> Path:
    """Write the checkpoint of a step; it is there whole or not at all. RunError where the disk refuses."""
    folder = run / f"checkpoint-{step}"
    try:
        with new_folder(folder) as beside:
            save_file(plain(trained), beside / TRAINED)
            save_file(plain(optimizer), beside / OPTIMIZER)
            write_json(beside / STATE, state)
            write_json(beside / MANIFEST, {name: sha256(beside / name) for name in (TRAINED, OPTIMIZER, STATE)})
    except (OSError, SafetensorError) as error:
        raise RunError("train.not_saved", path=folder, problem=error) from error
    return folder


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors writes neither views nor tensors that share memory."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def newest(run: Run, console: Console) -> Path | None:
    """The newest checkpoint that is as it was written; what is passed over is said."""
    for folder in reversed(run.checkpoints()):
        problem = damage(folder)
        if problem is None:
            return folder
        console.warn("train.damaged_checkpoint", path=folder.name, problem=problem)
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a word; None if nothing is."""
    try:
        manifest = read_json(folder / MANIFEST)
        wrong = [name for name in (TRAINED, OPTIMIZER, STATE) if sha256(folder / name) != manifest.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return wrong[0] if wrong else None


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Any]:
    """(trained, optimizer, state)"""
    return load_file(folder / TRAINED), load_file(folder / OPTIMIZER), read_json(folder / STATE)


def load_trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TRAINED)


def prune(run: Run, keep: int, always: Iterable[int]) -> None:
    """Remove all but the newest `keep`, and those of the steps `always`. Never the only whole one."""
    for folder in run.checkpoints()[:-keep]:
        if int(folder.name.partition("-")[2]) not in always:
            shutil.rmtree(folder, ignore_errors=True)
