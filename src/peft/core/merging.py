"""Merging that proves itself: what a merge kept of an adapter is measured, and too great a loss is refused.

On a quantized base there are three targets. "requantized" keeps the size, but rounding takes away what is smaller than
its steps: in 4 bits, all of a usual adapter. "dequantized" gives a float model that does what the adapted one did.
"original" puts the adapter into the weights that the base was quantized from; it was not trained on those.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from peft import quant
from peft.core import extras, match
from peft.core.layer import AdapterLayer, check_finite
from peft.errors import CheckpointError, MergeError
from peft.layers.kind import bare
from peft.layers.linear import Linear
from peft.storage.shards import Shards

MAX_ERROR = 0.5  # the part of an adapter's effect that requantizing may lose unless told otherwise
TARGETS = ("requantized", "dequantized", "original")
FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable", "is_quantized")
OF_QUANTIZERS = ("hf_quantizer", "quantization_method", "_weight_conversions")
LINEAR = Linear()


@dataclass
class LayerMerge:
    """One layer: the adapter's effect Δ against the base weight W, and what became of it."""

    name: str
    size: float  # ‖Δ‖ / ‖W‖
    error: float  # ‖merged - (W + Δ)‖ / ‖Δ‖


@dataclass
class OutputDifference:
    """Outputs for the same inputs after and before a merge."""

    largest: float
    scale: float  # the largest output before
    error: float | None  # norm of the difference, relative to that of what the adapter does to the outputs


@dataclass
class MergeReport:
    """What a merge kept. `error` is that of all layers together, relative to the adapter's own effect."""

    target: str
    layers: list[LayerMerge] = field(default_factory=list)
    error: float = 0.0
    outputs: OutputDifference | None = None

    def worst(self, n=3):
        """The layers that lost most."""
        return sorted(self.layers, key=lambda m: -m.error)[:n]

    def __str__(self):
        lines = [f"merged into: {self.target}; lost of the adapter's effect: {self.error:.1%}"]
        lines += [f"  {m.name}: {m.error:.1%} of an effect of {m.size:.1%} of the weight" for m in self.worst(5)]
        if (o := self.outputs) is not None:
            lines.append(f"outputs: largest difference {o.largest:.3g}, of outputs up to {o.scale:.3g}")
        return "\n".join(lines)


class Measured:
    """Collects layers for a report."""

    def __init__(self, target):
        self.report, self.lost, self.effect = MergeReport(target), 0.0, 0.0

    def add(self, name, W, wanted, merged):
        """W: the base weight, wanted: with the adapter, merged: what is kept of that."""
        effect, lost = float((wanted - W.float()).norm()), float((merged.float() - wanted).norm())
        if effect:
            self.report.layers.append(LayerMerge(name, effect / max(float(W.float().norm()), 1e-30), lost / effect))
        self.lost, self.effect = self.lost + lost**2, self.effect + effect**2

    def done(self):
        self.report.error = (self.lost / self.effect) ** 0.5 if self.effect else 0.0
        return self.report


@torch.no_grad()
def merge_and_unload(
    tuner,
    safe_merge=False,
    adapter_names=None,
    *,
    target=None,
    original=None,
    dtype=None,
    verify=False,
    inputs=None,
    max_error=MAX_ERROR,
    force=False,
):
    """The base model with adapters (default: the active ones) in its weights; the tuner is used up.

    target    "requantized" (default): each weight as it is stored; "dequantized": quantized layers become nn.Linear;
              "original": they become nn.Linear with the weights in the safetensors files of `original`
    original  folder, or hub id, of the model that the base was quantized from
    dtype     of the whole result, for the two float targets; None: that of the base's float parameters
    verify    compare outputs before and after, and measure float layers too; `inputs`: for what inputs (a tensor, or a
              dict of keyword arguments; None: a few tokens, where the model has a vocabulary)
    max_error, force   requantizing that loses more of the adapter's effect raises MergeError, and changes nothing,
              unless force=True

    The result has a `merge_report`, a MergeReport; of float layers only with verify.
    """
    _check_options(target, original, dtype)
    tuner.check_mergeable(adapter_names)
    names = list(tuner.state.active if adapter_names is None else adapter_names)
    verify = verify or inputs is not None
    probe = _Probe(tuner, inputs, names) if verify else None
    quantized = any(layer.backend.name for layer in tuner.layers.values())
    if target in ("dequantized", "original"):
        report = _into_floats(tuner, names, safe_merge, target, original, dtype, verify)
    else:
        report = _in_place(tuner, names, safe_merge, "requantized" if quantized else "float", verify, max_error, force)
    model = tuner.dismantle(lambda wrapper: extras.merged_module(wrapper, names))
    if target in ("dequantized", "original"):
        _forget_quantization(model, dtype)
    if probe is not None:
        report.outputs = probe.compare(model)
    if verify or quantized:
        model.merge_report = report
    return model


def _check_options(target, original, dtype):
    if target not in (None, *TARGETS):
        raise MergeError(f"target={target!r} is unknown: use one of {', '.join(map(repr, TARGETS))}.")
    if (target == "original") != (original is not None):
        raise MergeError(
            "target='original' and original=... belong together: original is the folder or the hub id of the model "
            f"that the base was quantized from. Got target={target!r}, original={original!r}."
        )
    if dtype is not None and (target in (None, "requantized") or not dtype.is_floating_point):
        raise MergeError(f"dtype={dtype} is for target='dequantized' and 'original', and must be a float dtype.")


# -- in place -------------------------------------------------------------------------------------------------------
def _in_place(tuner, names, safe_merge, target, verify, max_error, force):
    before = {layer: len(layer.merged_adapters) for layer in tuner._innermost_first()}
    tuner.merge_adapter(adapter_names=names, safe_merge=safe_merge)
    measured = Measured(target)
    for path, layer in tuner.layers.items():
        if layer.merged and (layer.backend.lossy or verify) and layer.kind.name != "mha":
            _measure(measured, path, layer)
    report = measured.done()
    if target == "requantized" and report.error > max_error and not force:
        for layer, kept in reversed(before.items()):
            if len(layer.merged_adapters) > kept:
                layer.unmerge(keep=kept)
        raise MergeError(_refusal(report, max_error))
    for layer in tuner._innermost_first():
        layer.forget_merge()
    return report


def _measure(measured, path, layer):
    W, base = layer.base_weight(), layer.get_base_layer()
    wanted = layer.adapted_weight([layer.adapters[n] for n in layer.merged_adapters], W)
    packed = layer.backend.get(base, layer.kind.param)
    measured.add(path, W, wanted, layer.kind.canon(layer.backend.unpack(base, packed)))


def _refusal(report, max_error):
    worst = ", ".join(f"{m.name} ({m.error:.0%})" for m in report.worst())
    return (
        f"Merging back into the quantized weights would lose {report.error:.0%} of what the adapter does to them, more "
        f"than {max_error:.0%}; most in {worst}. Nothing was changed. target='dequantized' merges into a float model "
        "that keeps it, target='original' with original=PATH into the weights that the base was quantized from; "
        "force=True, or a higher max_error, requantizes all the same."
    )


# -- into floats ----------------------------------------------------------------------------------------------------
def _into_floats(tuner, names, safe_merge, target, original, dtype, verify):
    """All quantized layers become float ones, adapted or not; nothing is changed before all of them are made."""
    merged_before = [n for layer in tuner.layers.values() for n in layer.merged_adapters]
    if merged_before:
        tuner.unmerge_adapter()
    names = list(dict.fromkeys([*merged_before, *names]))
    everywhere = places_of(tuner.model)
    dtype = dtype or _float_dtype(everywhere.values())
    places = {path: place for path, place in everywhere.items() if place.backend.name}
    measured, new = Measured(target), {}
    for path, W in _float_weights(tuner.model, places, original):
        place = places[path]
        merged, bias = place.adapted(names, W)
        check_finite(merged, W, safe_merge, names, path)
        kept = merged.to(dtype)
        new[path] = _float_layer(place.base, kept, bias)
        if place.wrappers:
            trained = place.weight() if original is not None else W
            wanted = place.adapted(names, trained)[0] if original is not None else merged
            measured.add(place.key, trained, wanted, kept)
    for layer in tuner._innermost_first():
        if not layer.backend.name:
            layer.merge(safe_merge=safe_merge, adapter_names=[n for n in names if n in layer.adapters])
    for path, layer in tuner.layers.items():
        if verify and layer.merged and layer.kind.name != "mha":
            _measure(measured, path, layer)
    for layer in tuner._innermost_first():
        layer.forget_merge()
    for path, module in new.items():
        match.put(tuner.model, path, module)
    return measured.done()


@dataclass
class Place:
    """A layer of the base model. key: its name there; wrappers: around it, the innermost first."""

    key: str
    base: nn.Module
    wrappers: list[AdapterLayer]

    @property
    def backend(self):
        return quant.find(self.base)

    def weight(self):
        """The stored weight as floats."""
        return self.backend.unpack(self.base, self.backend.get(self.base, "weight"))

    def adapted(self, names, W):
        """(canonical weight in float32, bias) with these adapters, from a canonical base weight."""
        bias = getattr(self.base, "bias", None)
        for layer in self.wrappers:
            adapters = [layer.adapters[n] for n in names if n in layer.adapters]
            for adapter in adapters:
                bias = adapter.merged_bias(bias, W)
            W = layer.adapted_weight(adapters, W)
        return W, bias


def places_of(model):
    """{path of the base layer: Place} of all layers of a model with adapters."""
    found = {}
    for key, path, module in match.walk(model):
        wrappers = []
        while isinstance(module, AdapterLayer):
            wrappers.insert(0, module)
            module, path = module._modules["base_layer"], f"{path}.base_layer"
        found[path] = Place(key, module, wrappers)
    return found


def _float_weights(model, places, original):
    """(path, float weight) of each place, its own or that in the files of `original`, one at a time."""
    if original is None:
        yield from ((path, place.weight()) for path, place in places.items())
        return
    shards = Shards(original)
    names = shards.named([f"{p.key}.weight" for p in places.values()], getattr(model, "base_model_prefix", ""))
    key_of = {path: names[f"{place.key}.weight"] for path, place in places.items()}
    for path in sorted(places, key=lambda path: shards.file_of[key_of[path]]):
        place = places[path]
        device, _ = place.backend.placement(place.base, "weight")
        yield path, original_weight(shards, key_of[path], place.base).to(device)


def original_weight(shards, key, base):
    """The weight (out, in) in the original's files that a quantized linear layer was made from.

    Raises CheckpointError where it has another shape.
    """
    W = LINEAR.unquantized(base).canon(shards.read(key))
    if tuple(W.shape) != (base.out_features, base.in_features):
        raise CheckpointError(
            f"{key} of {shards.source} is a weight for {W.shape[1]} inputs and {W.shape[0]} outputs, but the quantized "
            f"layer has {base.in_features} and {base.out_features}. It must be the model that this was made from."
        )
    return W


def _float_layer(base, W, bias):
    """The layer that a quantized one was made from, with other values."""
    out, inp = W.shape
    bias = None if bias is None else bias.detach().to(W.dtype)
    if LINEAR.unquantized(base) is LINEAR:
        new = bare(nn.Linear, {"in_features": inp, "out_features": out}, weight=W, bias=bias)
    else:
        new = bare(base.source_cls, {"nx": inp, "nf": out}, weight=W.T.contiguous(), bias=bias)
    for p in new.parameters():
        p.requires_grad = False
    return new.train(base.training)


def _float_dtype(places):
    """The dtype of the base's activations: that of its largest float parameter, else what its layers compute in."""
    tensors = [p for place in places if not place.backend.name for p in place.base._parameters.values()]
    tensors = [p for p in tensors if p is not None and p.is_floating_point()]
    if tensors:
        return max(tensors, key=torch.Tensor.numel).dtype
    first = next(iter(places))
    return first.backend.placement(first.base, "weight")[1]


def _forget_quantization(model, dtype):
    """What transformers notes about a quantized model is no longer true."""
    for name in FLAGS:
        if getattr(model, name, False):
            setattr(model, name, False)
    for name in OF_QUANTIZERS:
        model.__dict__.pop(name, None)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if dtype is not None:
        model.to(dtype)


# -- outputs --------------------------------------------------------------------------------------------------------
class _Probe:
    """Outputs of a model with adapters for some inputs, to be compared with those of the merged one."""

    def __init__(self, tuner, inputs, names):
        self.inputs = _probe_inputs(tuner.model) if inputs is None else inputs
        self.before = self.base = None
        if self.inputs is not None:
            state, merged = tuner.state, any(layer.merged for layer in tuner.layers.values())
            kept = state.active, state.enabled
            state.active = tuple(names)
            try:
                self.before = self._outputs(tuner.model)
                if not merged:
                    state.enabled = False
                    self.base = self._outputs(tuner.model)
            finally:
                state.active, state.enabled = kept

    def _outputs(self, model):
        """Without dropout; quantized layers as in training, where their libraries do not round activations too."""
        modes = [(m, m.training) for m in model.modules()]
        try:
            model.eval()
            for module, _ in modes:
                if quant.find(module).name:
                    module.training = True
            out = model(**self.inputs) if isinstance(self.inputs, dict) else model(self.inputs)
        finally:
            for module, mode in modes:
                module.training = mode
        out = getattr(out, "logits", out)
        out = out if isinstance(out, torch.Tensor) else getattr(out, "last_hidden_state", None)
        if out is None:
            raise MergeError("verify=True compares logits, but this model returns none. Leave verify at False.")
        return out.float()

    def compare(self, model):
        """An OutputDifference, or None where there were no inputs."""
        if self.before is None:
            return None
        difference = self._outputs(model) - self.before
        effect = 0.0 if self.base is None else float((self.before - self.base).norm())
        error = float(difference.norm()) / effect if effect else None
        return OutputDifference(float(difference.abs().max()), float(self.before.abs().max()), error)


def _probe_inputs(model):
    """A few tokens, always the same, or None for a model without a vocabulary."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int) or size < 2 or not hasattr(model, "get_input_embeddings"):
        return None
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(32, device=device).mul_(7919).remainder_(size)
    return {"input_ids": ids.view(2, 16)}
