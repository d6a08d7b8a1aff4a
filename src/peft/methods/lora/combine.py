"""Weighted combinations of LoRA adapters as a new adapter: exact ones, and the pruning ones of TIES and DARE."""

import dataclasses
import math
import warnings

import torch

from peft.errors import AdapterError, PeftWarning
from peft.methods import combining
from peft.methods.lora import factors, merge_utils
from peft.methods.lora.config import VARIANTS

PRUNING = {
    "ties": merge_utils.ties,
    "dare_ties": merge_utils.dare_ties,
    "dare_linear": merge_utils.dare_linear,
    "magnitude_prune": merge_utils.magnitude_prune,
}
TYPES = ("svd", "linear", "cat", *PRUNING, *(f"{name}_svd" for name in PRUNING))
FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
TOLERATED = 0.01  # a relative error above this is worth a warning


@dataclasses.dataclass
class Method:
    """How to combine: one of TYPES and its settings."""

    name: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_driver: str | None
    density: float | None
    majority_sign_method: str

    @property
    def on_factors(self):
        """Whether A and B are merged apart, which needs equal ranks and is not the sum of the products."""
        return self.name == "linear" or self.name in PRUNING

    def merge(self, tensors, weights):
        """Merge tensors of one shape."""
        weights = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        name = self.name.removesuffix("_svd")
        if name not in PRUNING:
            return merge_utils.task_arithmetic(tensors, weights)
        sign = [self.majority_sign_method] if name.endswith("ties") else []
        return PRUNING[name](tensors, weights, self.density, *sign)


def add_weighted_adapter(
    tuner,
    adapters,
    weights,
    adapter_name,
    combination_type="svd",
    svd_rank=None,
    svd_clamp=None,
    svd_full_matrices=True,
    svd_driver=None,
    density=None,
    majority_sign_method="total",
):
    """Make the adapter `adapter_name`, inactive and frozen, from a weighted sum of others. Nothing if the name exists.

    combination_type
        cat              exact; its rank is the sum of the ranks
        svd              the best approximation of rank `svd_rank` (default: the largest rank), exact if that suffices
        linear           sums A and B apart: small, but the products of different adapters' A and B come in as well
        ties, dare_ties, dare_linear, magnitude_prune    prune A and B to `density`, then sum; equal ranks only
        <those>_svd      prune the full updates to `density`, sum, and approximate at `svd_rank`
    svd_clamp: cut the factors at this quantile. svd_driver: for torch.linalg.svd on CUDA. svd_full_matrices changes
    nothing in the result. majority_sign_method: "total" or "frequency", for ties.
    One adapter alone is always scaled exactly. Raises ValueError (AdapterError) for adapters that cannot be combined;
    the model is then as before. Warns, with the measured error, where linear or svd are not close to the sum.
    """
    if adapter_name in tuner.peft_config:
        return
    adapters, weights = list(adapters), [float(w) for w in weights]
    how = Method(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
    _check(tuner, adapters, weights, how)
    if len(adapters) == 1:
        how.name = "linear"
    sources = {}
    for path, layer in tuner.layers.items():
        parts = [(layer.adapters[a], w) for a, w in zip(adapters, weights) if a in layer.adapters]
        if parts:
            _check_layer(parts, how)
            sources[path] = parts
    with torch.no_grad():
        made = {path: _combine(parts, how) for path, parts in sources.items() if parts[0][0].twin is None}
    config = _config(tuner, adapters, how, made, sources)
    _warn_if_inexact(sources, made, how)
    tuner.inject_adapter(tuner.model, adapter_name, config)
    try:
        _fill(tuner, adapter_name, config.r, made, sources)
        combining.copy_extras(tuner, adapters, adapter_name)
    except BaseException:
        tuner.delete_adapter(adapter_name)
        raise


# -- what can be combined ------------------------------------------------------------------------------------------
def _check(tuner, adapters, weights, how):
    combining.check_request(tuner, adapters, weights)
    if how.name not in TYPES:
        raise AdapterError(f"Invalid combination_type: {how.name}. Use one of {', '.join(TYPES)}.")
    if how.name.removesuffix("_svd") in PRUNING and (how.density is None or how.density < 0):
        raise AdapterError(f"combination_type={how.name!r} needs a density, the part of values to keep, above 0.")
    if how.svd_rank is not None and how.svd_rank < 1:
        raise AdapterError(f"svd_rank must be at least 1, got {how.svd_rank}.")


def _check_layer(parts, how):
    """Raise AdapterError where these adapters of one layer have no combination of this type."""
    for a, _ in parts:
        if a.kind.name == "param":
            raise AdapterError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter {a.name!r})."
            )
        if not a.converts:
            raise AdapterError(
                f"Adapter {a.name!r} is an {a.title}: what it does is no product of factors, so nothing can be summed."
            )
        if a.lora_magnitude_vector is not None:
            raise AdapterError(
                f"Adapter {a.name!r} is a DoRA: its update depends on the base weight and is no product of factors, so "
                "there is nothing to sum. Turn it into a plain LoRA with peft.save_as_lora and combine that."
            )
        if a.lora_start_A is not None and how.name in PRUNING:
            raise AdapterError(
                f"combination_type={how.name!r} cannot prune adapter {a.name!r}, initialised by {a.mode!r}: its update "
                f"is the difference of two products. Use {how.name}_svd, svd or cat."
            )
        if how.name.endswith("svd") and getattr(a.base, "groups", 1) > 1:
            raise AdapterError(
                f"combination_type={how.name!r} needs the update of {a.key} as one matrix, but it is a convolution "
                "with groups. Use cat."
            )
    ranks = {a.effective_factors()[0].shape[0] for a, _ in parts}
    if how.on_factors and len(ranks) > 1:
        raise AdapterError(
            f"All adapters must have the same r value when using combination_type {how.name}, but {parts[0][0].key} "
            f"has adapters of the ranks {sorted(ranks)}. Use svd or cat."
        )


# -- arithmetic ----------------------------------------------------------------------------------------------------
def _combine(parts, how):
    """(A, B, bias or None) of the new adapter, which has scaling 1, on one layer."""
    pairs = [[t.float() for t in a.effective_factors()] for a, _ in parts]
    scales = [w * float(a.scaling) for a, w in parts]
    biases = [getattr(a.lora_B, "bias", None) for a, _ in parts]
    bias = None
    if any(b is not None for b in biases):
        bias = how.merge(
            [pair[1].new_zeros(len(pair[1])) if b is None else b for b, pair in zip(biases, pairs)], scales
        )
    if how.on_factors:
        roots = [math.sqrt(abs(s)) for s in scales]
        A = how.merge([A for A, _ in pairs], [math.copysign(r, s) for r, s in zip(roots, scales)])
        return A, how.merge([B for _, B in pairs], roots), bias
    if how.name == "cat":
        return *_sum(pairs, scales), bias
    rank = how.svd_rank or max(A.shape[0] for A, _ in pairs)
    if how.name == "svd" and how.svd_clamp is None and how.svd_driver is None and pairs[0][0].ndim == 2:
        return *factors.svd(*_sum(pairs, scales), rank), bias
    deltas = [a.delta_weight().float().flatten(1) for a, _ in parts]
    A, B = factors.svd_dense(how.merge(deltas, [w for _, w in parts]), rank, how.svd_driver, how.svd_clamp)
    like_A, like_B = pairs[0]
    return A.reshape(rank, *like_A.shape[1:]), B.reshape(len(B), rank, *like_B.shape[2:]), bias


def _sum(pairs, scales):
    """The exact weighted sum, as one pair of factors."""
    return factors.joined([(A * s, B) for (A, B), s in zip(pairs, scales)])


def _warn_if_inexact(sources, made, how):
    """Measure what was made against the true weighted sum."""
    if how.name not in ("linear", "svd"):
        return
    wrong = total = 0.0
    for path, (A, B, _) in made.items():
        parts = sources[path]
        exact = _sum([a.effective_factors() for a, _ in parts], [w * float(a.scaling) for a, w in parts])
        wrong += factors.square_norm(*factors.joined([(A, -B), exact]))
        total += factors.square_norm(*exact)
    if wrong > TOLERATED**2 * total:
        error = math.sqrt(wrong / total) if total else math.inf
        warnings.warn(
            f"combination_type={how.name!r} is off by {error:.0%} of the weighted sum of these adapters (relative "
            "error of the weight updates). 'cat' is exact, and so is 'svd' with an svd_rank as large as the sum of "
            "the ranks.",
            PeftWarning,
            stacklevel=5,
        )


# -- the new adapter -----------------------------------------------------------------------------------------------
def _config(tuner, adapters, how, made, sources):
    """The first adapter's config, for the layers of all of them, with alpha = r so that the scaling is 1."""
    configs = [tuner.peft_config[a] for a in adapters]
    ranks = [A.shape[0] for A, _, _ in made.values()]
    if how.name == "cat":
        ranks.append(sum(c.r for c in configs))
    elif how.on_factors:
        ranks.append(max(c.r for c in configs))
    whole = list(dict.fromkeys(m for c in configs for m in c.modules_to_save or ()))
    same = all(getattr(c, f) == getattr(configs[0], f) for c in configs for f in FILTERS)
    filters = {} if same else dict.fromkeys(FILTERS)
    return dataclasses.replace(
        configs[0],
        r=max(ranks),
        lora_alpha=max(ranks),
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        peft_version=None,  # this one's: an older version would scale some layers by two
        init_lora_weights=True,
        **{name: False if name == "use_qalora" else None for name in VARIANTS},
        lora_bias=any(c.lora_bias for c in configs),
        target_modules=combining.union([c.target_modules for c in configs])
        if same
        else {p[0][0].key for p in sources.values() if not p[0][0].layer.owned},
        modules_to_save=whole or None,
        trainable_token_indices=next((c.trainable_token_indices for c in configs if c.trainable_token_indices), None),
        ensure_weight_tying=any(c.ensure_weight_tying for c in configs),
        **filters,
    )


def _fill(tuner, name, rank, made, sources):
    """Write the combined tensors into the new adapter."""
    for path, parts in sources.items():
        new = tuner.layers[path].adapters.get(name)
        if (
            new is None
            or (new.twin is None) != (path in made)
            or any((a.twin is None) != (path in made) for a, _ in parts)
        ):
            raise AdapterError(
                f"These adapters cannot be combined: {parts[0][0].key} is tied to another layer in some of them only. "
                "Load them all with the same ensure_weight_tying and target_modules."
            )
        if path not in made:
            continue
        A, B, bias = made[path]
        with torch.no_grad():
            for old, value in zip(new.factors(), factors.widened(A, B, rank)):
                old.copy_(value)
            if bias is not None:
                new.lora_B.bias.copy_(bias)
