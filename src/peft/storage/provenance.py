"""adapter_provenance.json: what an adapter file says of the base model it was trained on, and the check on loading.

A few numbers from a few adapted layers are enough to tell one base from another, cost nothing to read, and survive a
change of dtype. Readers that do not know the file ignore it.
"""

import json
import os
import warnings

import torch

from peft.errors import BaseMismatchError, PeftWarning
from peft.version import __version__

FLOAT = "float"
FILE_NAME = "adapter_provenance.json"
LAYERS, NUMBERS = 8, 16
TOLERANCE = 0.05  # relative; bfloat16 rounding is 0.004, another model is about 1.4
QUANTIZED = 0.8  # in its place where one side is quantized: 4 bits move weights by 0.1, 2 bits by 0.5
NOTICEABLE = 0.02  # from here on what was trained on a quantized base acts otherwise on another copy; 8 bits: 0.01


def sample(layer):
    """A few base weights of a layer, evenly spaced, as the float model's files have them; None where it has no one
    weight, or it is not here or only its library can read it."""
    base, kind = layer.get_base_layer(), layer.kind
    if kind.name in ("mha", "whole", "attention", "block", "sublayer"):
        return None
    if layer.backend.name:
        try:
            W = layer.backend.unpack(base, layer._undo[0][1] if layer.merged else layer.backend.get(base, kind.param))
        except Exception:  # of its library, which may need another device to read it: no reason not to save
            return None
        W = kind.unquantized(base).uncanon(kind.canon(W))
    else:
        W = layer._undo[0][1] if layer.merged else getattr(base, kind.param)
    if W.is_meta or not W.is_floating_point() or type(W.data) is not torch.Tensor:
        return None
    flat = W.detach().reshape(-1) if W.is_contiguous() else W.detach().contiguous().reshape(-1)
    step = max(1, flat.numel() // NUMBERS)
    return flat[::step][:NUMBERS].float().tolist()


def describe(model, layers, adapter_name):
    """The file's content as bytes, for a base model, its adapted layers by path, and one adapter."""
    layers = list(_adapted_layers(layers, adapter_name).items())
    step = max(1, len(layers) // LAYERS)
    samples = {key: sample(layer) for key, layer in layers[::step][:LAYERS]}
    stored = {layer.backend.storage for _, layer in layers} - {FLOAT}
    config = getattr(model, "config", None)
    return json.dumps(
        {
            "format": 1,
            "peft_version": __version__,
            "torch_version": str(torch.__version__),
            "base_model_class": type(model).__name__,
            "base_model_type": getattr(config, "model_type", None),
            "base_vocab_size": getattr(config, "vocab_size", None),
            "base_stored_as": ", ".join(sorted(stored)) or FLOAT,
            "base_samples": {k: v for k, v in samples.items() if v},
        },
        indent=2,
    ).encode()


def _adapted_layers(layers, adapter_name):
    """{key in the unwrapped model: layer} of those with the adapter."""
    return {
        layer.adapters[adapter_name].key or path: layer
        for path, layer in layers.items()
        if adapter_name in layer.adapters and not layer.owned
    }


def check(model, layers, adapter_name, path):
    """Compare a model with the provenance file beside its adapter, if there is one.

    Raises BaseMismatchError where the base weights differ from those the adapter was trained on. Models without a
    model_type (plain modules) get a PeftWarning instead: their initialisation is often random. So does an adapter that
    was trained on a quantized base, on a copy of it that is stored otherwise.
    """
    if path is None or not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as f:
            file = json.load(f)
        told = {k: torch.tensor(v, dtype=torch.float32) for k, v in file["base_samples"].items()}
        trained_on = str(file.get("base_stored_as", FLOAT))
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # not ours, or of a later format
    layers = _adapted_layers(layers, adapter_name)
    worst, where, quantized = 0.0, None, trained_on != FLOAT
    for key, before in told.items():
        now = sample(layers[key]) if key in layers else None
        if now is None or len(now) != len(before):
            continue
        quantized = quantized or layers[key].backend.storage != FLOAT
        difference = float((torch.tensor(now) - before).norm() / (before.norm() + 1e-12))
        if difference > worst:
            worst, where = difference, key
    if worst <= (QUANTIZED if quantized else TOLERANCE):
        now = {layer.backend.storage for layer in layers.values()}
        if trained_on != FLOAT and trained_on not in now and worst > NOTICEABLE:
            _warn(
                f"Adapter {adapter_name!r} was trained on a base stored as {trained_on}. This one is stored as "
                f"{', '.join(sorted(now))} and its weights differ by {worst:.0%}, so what comes out differs from what "
                "was trained, the more so if the adapter started with LoftQ. Load the base as it was for training, and "
                'merge there with target="dequantized"; or pass check_base=False.'
            )
        return
    message = (
        f"Adapter {adapter_name!r} was trained on another base model: the weights of {where} differ by "
        f"{worst:.0%}. Load the base model that the adapter's config names, or, if applying it to this one is what you "
        "want, pass check_base=False."
    )
    if getattr(getattr(model, "config", None), "model_type", None) is None:
        _warn(message)
        return
    raise BaseMismatchError(message)


def _warn(message):
    warnings.warn(message, PeftWarning, stacklevel=5)
