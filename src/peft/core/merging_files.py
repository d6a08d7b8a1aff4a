"""Merge into the files of the original model, one of them at a time: neither model is ever in memory as floats."""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from peft.core import extras
from peft.core.layer import check_finite
from peft.core.merging import Measured, Place, places_of
from peft.errors import CheckpointError, MergeError
from peft.storage.shards import INDEX, Shards


@torch.no_grad()
def save_merged(model, folder, original, adapter_names=None):
    """Write the original model with adapters (default: the active ones) merged in, one file of it at a time.

    model: a PeftModel, whose base may be quantized; it stays as it is. folder: a new one, or an empty one; it appears
    only when it is complete. original: folder or hub id of the model that the base was made from. Never holds more
    than one of its files in memory. Returns a MergeReport, which is also in merge_report.json.
    """
    tuner = getattr(model, "base_model", model)
    tuner.check_mergeable(adapter_names)
    names = list(tuner.state.active if adapter_names is None else adapter_names)
    folder, shards = Path(folder), Shards(original)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty. Choose a new folder for the merged model.")
    changes, measured = _changes(tuner, names, shards), Measured("original")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in shards.files:
            _write_shard(shards, name, beside / name, changes, measured)
        for path in shards.other_files():
            shutil.copy2(path, beside / path.name)
        if (shards.folder / INDEX).is_file():
            shutil.copy2(shards.folder / INDEX, beside / INDEX)
        report = measured.done()
        (beside / "merge_report.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return report


def _changes(tuner, names, shards):
    """{key in the files: function (tensor, measured) -> tensor} of all that the adapters change."""
    places = {
        p.key: p for p in places_of(tuner.model).values() if any(set(w.adapters) & set(names) for w in p.wrappers)
    }
    wanted = {}
    for key, place in places.items():
        if {w.kind.param for w in place.wrappers} != {"weight"}:
            raise MergeError(f"{key} is adapted in another way than by its weight; merge in memory and save the model.")
        wanted[f"{key}.weight"] = _weight_change(place, names)
        if any(w.adapters[n].changes_bias for w in place.wrappers for n in names if n in w.adapters):
            W = place.wrappers[0].base_weight()
            if (place.adapted(names, W)[1] is None) != (getattr(place.base, "bias", None) is None):
                raise MergeError(f"Merging gives {key} a bias, for which the original model has no place.")
            if getattr(place.base, "bias", None) is not None:
                wanted[f"{key}.bias"] = _bias_change(place, names)
    for path, wrapper in tuner.extras.items():
        chosen = extras.merged_module(wrapper, names)
        if (hosted := extras.hosted_layer(wrapper)) is not None:
            wanted[f"{path}.weight"] = _weight_change(Place(path, chosen, [hosted]), names)
        elif chosen is not wrapper.original_module:
            wanted |= {f"{path}.{key}": _replacement(new) for key, new in chosen.state_dict().items()}
    found = shards.named(list(wanted), getattr(tuner.model, "base_model_prefix", ""))
    return {found[name]: change for name, change in wanted.items()}


def _weight_change(place, names):
    def change(old, measured):
        layer = place.wrappers[0]
        kind, device = layer.kind.unquantized(place.base), layer.placement()["device"]
        if tuple(kind.canon(old).shape) != tuple(layer.shape):
            raise CheckpointError(f"{place.key}.weight has the shape {tuple(old.shape)} in the original's files.")
        new = kind.uncanon(place.adapted(names, kind.canon(old.to(device)))[0]).to(old.dtype)
        check_finite(new, old, False, names, place.key)
        trained = layer.base_weight()
        measured.add(place.key, trained, place.adapted(names, trained)[0], kind.canon(new))
        return new

    return change


def _bias_change(place, names):
    return lambda old, measured: place.adapted(names, place.wrappers[0].base_weight())[1].to(old.dtype)


def _replacement(new):
    return lambda old, measured: new.to(old.dtype)


def _write_shard(shards, name, path, changes, measured):
    from safetensors.torch import save_file

    with shards.open(name) as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in shards.files[name]}
    for key in tensors.keys() & changes.keys():
        tensors[key] = changes[key](tensors[key], measured).cpu().contiguous()
    try:
        save_file(tensors, path, metadata or {"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"Writing {path.name} failed: {error}. Nothing is left of the merged model.") from error
