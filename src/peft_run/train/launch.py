"""`peft train --launcher`: the same command once in each process, started by torchrun or accelerate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peft_run.errors import UsageError
from peft_run.packages import require

LAUNCHERS = ("torchrun", "accelerate")
CODE = "PEFT_EXIT_CODE_FILE"  # where the first process leaves its exit code, which launchers replace by 1


class Shape(NamedTuple):
    """Which processes there are, and how they find each other."""

    per_node: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 29500

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Shape:
        """From NPROC_PER_NODE (default: the GPUs, or 1), NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT."""

        def number(name: str, default: int, least: int) -> int:
            text = environment.get(name) or str(default)
            if not text.isdecimal() or int(text) < least:
                raise UsageError("world.bad_number", name=name, value=text, least=least)
            return int(text)

        nodes = number("NNODES", 1, 1)
        node = number("NODE_RANK", 0, 0)
        if node >= nodes:
            raise UsageError("world.bad_number", name="NODE_RANK", value=node, least=f"0, < {nodes}")
        if nodes > 1 and not environment.get("MASTER_ADDR"):
            raise UsageError("world.no_address")
        address = environment.get("MASTER_ADDR") or "127.0.0.1"
        return cls(number("NPROC_PER_NODE", gpus() or 1, 1), nodes, node, address, number("MASTER_PORT", 29500, 1))


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def command(launcher: str, shape: Shape, more: Sequence[str]) -> list[str]:
    """The launcher's command line, up to what it runs. `more` are arguments of the launcher, which win."""
    if launcher == "torchrun":
        where = [f"--nnodes={shape.nodes}", f"--node_rank={shape.node}"]
        where += [f"--master_addr={shape.address}", f"--master_port={shape.port}"]
        if shape.nodes == 1:  # finds a free port by itself
            where = ["--standalone", "--local_addr=127.0.0.1"]
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={shape.per_node}", *where, *more]
    require("accelerate", extra="run")
    total = shape.per_node * shape.nodes
    settings = [f"--num_processes={total}", f"--num_machines={shape.nodes}", f"--machine_rank={shape.node}"]
    settings += [f"--main_process_ip={shape.address}", f"--main_process_port={shape.port}"]
    if not any(word.startswith("--config_file") for word in more):
        # accelerate calls any start of several processes by torchrun that, also on CPUs.
        settings += ["--multi_gpu"] * (total > 1) + ["--mixed_precision=no", "--dynamo_backend=no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *settings, *more]


def launch(launcher: str, words: Sequence[str], more: Sequence[str]) -> int:
    """Run `peft train WORDS` in all processes; the exit code of the first. Ctrl-C reaches them through the launcher."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        full = [*command(launcher, Shape.of(os.environ), more), "-m", "peft_run", "train", *words]
        started = subprocess.Popen(full, env={**os.environ, CODE: str(code)})
        before = signal.signal(signal.SIGINT, lambda *_: None)  # the launcher gets it too, and stops the others
        try:
            returned = started.wait()
        finally:
            signal.signal(signal.SIGINT, before)
        return int(code.read_text()) if code.is_file() else returned


def note_exit_code(code: int) -> None:
    """Called by the first process, for the one that launched it."""
    if CODE in os.environ and os.environ.get("RANK", "0") == "0":
        Path(os.environ[CODE]).write_text(str(code))


def without_launcher(words: Sequence[str]) -> list[str]:
    """The command line that the processes get."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--launcher":
            skip = True
        elif not word.startswith("--launcher="):
            kept.append(word)
    return kept
