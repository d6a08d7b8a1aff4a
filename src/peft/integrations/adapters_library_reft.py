"""ReFT adapters that the `adapters` library (1.3) has saved, as ones of this library."""

import os
import re

import torch
from torch import nn

from peft.config import CONFIG_NAME
from peft.core.checkpoint import PREFIX
from peft.errors import CheckpointError, ConfigError
from peft.integrations.adapters_library import HEADS, WEIGHTS, read_first
from peft.methods.reft import ReftConfig
from peft.storage.files import commit_files, read_json
from peft.weights import serialised

TRAINED_HEADS = ("classifier", "score", "qa_outputs")  # language models write their own head too, which is the base's
UNIT = re.compile(r"(?P<block>.+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>\d+)\.(?P<tensor>.+)")
ORTHOGONAL = "projection.parametrizations.weight."


def convert_reft(folder, output, variant=None):
    """Write what the adapters library saved in `folder` as an adapter of this library into the folder `output`."""
    config, tensors = read_reft(folder, variant)
    name, data = serialised(tensors)
    commit_files(output, {CONFIG_NAME: config.to_json().encode(), name: data})


def read_reft(folder, variant=None):
    """(ReftConfig, {file key: tensor}) of a folder of the adapters library; a classifier beside it is taken along.

    variant: "noreft" or "direft", which its files do not tell from each other (it loads both as the former).
    Raises CheckpointError for files that are no such, or that do what ReFT here does not; ConfigError for the variant.
    """
    saved = read_json(os.path.join(folder, "adapter_config.json"))
    theirs = saved.get("config")
    if not isinstance(theirs, dict) or theirs.get("architecture") != "reft":
        raise CheckpointError(f"{folder} holds no ReFT adapter of the adapters library.")
    for field, known in (("non_linearity", None), ("output_reft", True)):
        if theirs.get(field, known) != known:
            raise CheckpointError(f"{folder} has {field}={theirs[field]!r}, which ReFT here cannot do.")
    tensors = read_first(folder, WEIGHTS)
    if tensors is None:
        raise CheckpointError(f"{folder} has none of the files {', '.join(WEIGHTS)}.")
    sides = [i for i, side in enumerate(("prefix_positions", "suffix_positions")) if theirs[side]]
    config = ReftConfig(
        r=theirs["r"],
        variant=_variant(theirs, variant),
        prefix_positions=theirs["prefix_positions"],
        suffix_positions=theirs["suffix_positions"],
        intervention_per="layer" if theirs["tied_weights"] or len(sides) < 2 else "side",
        dropout=theirs["dropout"],
        base_model_name_or_path=saved.get("model_name") or None,
        inference_mode=True,
    )
    units = [0] if theirs["tied_weights"] else sides
    blocks = _blocks(tensors)
    found = {PREFIX + key: t for block in blocks for key, t in _converted(block, blocks[block], units).items()}
    config.target_modules = set(blocks)
    head = {k: t for k, t in (read_first(folder, HEADS) or {}).items() if k.partition(".")[0] in TRAINED_HEADS}
    config.modules_to_save = sorted({k.partition(".")[0] for k in head}) or None
    return config, {**found, **{PREFIX + k: t for k, t in head.items()}}


def _variant(theirs, variant):
    if theirs["orthogonality"]:
        if variant not in (None, "loreft"):
            raise ConfigError(f"variant is {variant!r}, but the file is a LoReFT.")
        return "loreft"
    if variant not in ("noreft", "direft"):
        raise ConfigError(
            "The file is a NoReFT or a DiReFT, which the adapters library does not tell apart when it saves (and loads "
            f"as a NoReFT). Pass variant='noreft' or variant='direft', got {variant!r}."
        )
    return variant


def _blocks(tensors):
    """{block: {(unit, name): tensor}}"""
    blocks, other = {}, []
    for key, tensor in tensors.items():
        if (match := UNIT.fullmatch(key)) is None:
            other.append(key)
        else:
            blocks.setdefault(match["block"], {})[int(match["unit"]), match["tensor"]] = tensor
    if not blocks or other:
        raise CheckpointError(f"This is no ReFT of the adapters library: it has the tensors {other or list(tensors)}.")
    return blocks


def _converted(block, parts, units):
    """{key: tensor} of one block."""
    try:
        found = {
            "reft_R": [_projection(parts, i) for i in units],
            "reft_W": [parts[i, "learned_source.weight"] for i in units],
            "reft_b": [parts[i, "learned_source.bias"] for i in units],
        }
    except KeyError as error:
        unit, name = error.args[0]
        raise CheckpointError(f"The file lacks {name} of intervention {unit} in {block}.") from None
    return {f"{block}.{name}": torch.stack(tensors) for name, tensors in found.items()}


def _projection(parts, unit):
    """R (r, width), read as torch reads the orthogonal matrices that it has in parts."""
    if (unit, f"{ORTHOGONAL}original") not in parts:
        return parts[unit, "projection.weight"]
    state = {name: parts[unit, f"{ORTHOGONAL}{name}"].float() for name in ("original", "0.base")}
    r, width = state["original"].shape
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(width, r, bias=False))
    layer.parametrizations.weight.load_state_dict(state)
    R = layer.weight.detach()
    if not torch.allclose(R @ R.T, torch.eye(r), atol=1e-3):
        raise CheckpointError(
            "The rows of a LoReFT projection are not orthonormal, as torch reads it: weight decay does that to its "
            "parametrization. Such an adapter cannot be converted."
        )
    return R
