"""Any adapter whose update is a fixed weight, as a LoRA: the truncated SVD of that update."""

import re
import warnings

import torch

from peft.config import CONFIG_NAME
from peft.core import match
from peft.core.checkpoint import registry_of, tuner_parts
from peft.errors import AdapterError, PeftWarning
from peft.methods.lora.config import LoraConfig
from peft.storage.files import commit_files
from peft.weights import SAFETENSORS_WEIGHTS_NAME


def convert_to_lora(model, rank, adapter_name="default", progressbar=False, compile_kwargs=None):
    """(LoraConfig, tensors of its file) of the LoRA nearest to an adapter, layer by layer.

    rank: an int, the rank of every layer; or a float in (0, 1], the part of each update's energy (squared singular
    values) to keep, with as much rank as that takes. compile_kwargs: compile the SVD, with these arguments.
    What the adapter does to biases becomes lora_bias; modules trained whole are kept. The model stays as it is.
    Raises TypeError for layers whose update is no LoRA's (embeddings, convolutions, or a method that says so),
    ValueError for a rank that does not fit and for base biases that the adapter trained.
    """
    _check_rank(rank)
    prefix, base, configs = tuner_parts(model)
    if adapter_name not in configs:
        if not configs:
            raise TypeError("Could not detect any layer that supports LoRA conversion.")
        raise AdapterError(f"Adapter {adapter_name!r} does not exist; there are {list(configs)}.")
    config = configs[adapter_name]
    _check_config(config)
    layers, wrappers = _parts(model, base, adapter_name)
    decompose = _decompose if compile_kwargs is None else torch.compile(_decompose, **compile_kwargs)
    tensors, ranks, biases = {}, {}, {}
    for key, layer in _progress(layers.items(), progressbar):
        adapter = layer.adapters[adapter_name]
        with torch.no_grad():
            W = layer.base_weight().float()
            A, B = decompose(adapter.delta(W).float(), rank)
            dtype = next(adapter.parameters(frozen=True)).dtype
            tensors[f"{prefix}{key}.lora_A.weight"] = A.to(dtype).contiguous()
            tensors[f"{prefix}{key}.lora_B.weight"] = B.to(dtype).contiguous()
            ranks[key], biases[key] = len(A), _added_bias(layer, adapter, W).to(dtype)
    has_bias = any(b.any() for b in biases.values())
    if has_bias:
        tensors |= {f"{prefix}{key}.lora_B.bias": b for key, b in biases.items()}
    for key, wrapper in wrappers.items():
        tensors |= {f"{prefix}{key}.{s.file_key}": s.tensor.detach() for s in wrapper.saved_slots(adapter_name)}
    return _lora_config(config, layers, base, ranks if isinstance(rank, float) else rank, has_bias), tensors


def save_as_lora(path, model, rank, adapter_name="default", progressbar=False, compile_kwargs=None):
    """Write the LoRA nearest to an adapter into a folder; arguments and errors as for `convert_to_lora`."""
    from safetensors.torch import save

    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    data = save({k: t.contiguous().clone() for k, t in tensors.items()}, metadata={"format": "pt"})
    commit_files(path, {SAFETENSORS_WEIGHTS_NAME: data, CONFIG_NAME: config.to_json().encode()})


def _check_rank(rank):
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"rank must be an int, or a float that says which part of the update to keep, got {rank!r}.")
    if rank == 0:
        raise ValueError("rank must not be 0: an adapter of rank 0 does nothing.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"A float rank is the share of the update to keep, so it must lie between 0 and 1; got {rank}."
        )
    if rank < 0:
        raise ValueError(f"rank must be at least 1, got {rank}.")


def _check_config(config):
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise TypeError(
            "Could not detect any layer that supports LoRA conversion: "
            f"{config.peft_type.value} adapts no layer's weight."
        )
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(f"The adapter's config sets bias={bias}, this is not supported right now.")
    plain = isinstance(config, LoraConfig) and not config.use_dora and config.variant is None
    if plain and isinstance(config.init_lora_weights, bool):
        warnings.warn(
            "This adapter is plain LoRA already; converting it only makes sense to lower its rank.",
            PeftWarning,
            stacklevel=3,
        )


def _parts(model, base, name):
    """({key: AdapterLayer}, {key: wrapper}) that hold something for an adapter. TypeError where one is no LoRA's."""
    layers, wrappers = registry_of(model, base)
    layers = {layer.adapters[name].key: layer for layer in layers.values() if name in layer.adapters}
    unfit = {
        f"{type(layer).__name__} on {type(layer.get_base_layer()).__name__}": key
        for key, layer in layers.items()
        if not layer.supports_lora_conversion(name)
    }
    if unfit:
        raise TypeError(
            "Some module types on this model do not support LoRA conversion: "
            + ", ".join(f"{what} (for example {key})" for what, key in unfit.items())
            + "."
        )
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    return layers, {key: w for key, w in wrappers.items() if name in w.adapter_names}


def _decompose(delta, rank):
    """(A, B) with BA nearest to delta (out, in): of an int rank, or keeping a float part of the energy."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    if isinstance(rank, float):
        energy = S.square().cumsum(0)
        rank = min(int((energy < rank * energy[-1]).sum()) + 1, len(S))
    elif rank > len(S):
        raise ValueError(
            f"The chosen rank {rank} is larger than the weight shape ({len(S)}), please choose a lower rank."
        )
    return Vh[:rank], U[:, :rank] * S[:rank]


def _added_bias(layer, adapter, W):
    """(out,): what the adapter adds to the layer's bias."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    old = W.new_zeros(len(W)) if bias is None else bias.detach().float()
    new = adapter.merged_bias(old, W)
    return W.new_zeros(len(W)) if new is None else new.float() - old


def _lora_config(old, layers, base, ranks, has_bias):
    """ranks: one for all layers, or {key: rank}. alpha = r everywhere, so that the scaling is 1."""
    names = [key for key, _, _ in match.walk(base)]
    endings = {name[i + 1 :] for name in names for i, c in enumerate(name) if c == "."}
    ambiguous = [key for key in layers if key in endings]  # such a name would also match a longer one
    per_layer = isinstance(ranks, dict)
    patterns = {f"^{k}" if k in ambiguous else k: r for k, r in ranks.items()} if per_layer else {}
    r = 1 if per_layer else ranks
    return LoraConfig(
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules="|".join(map(re.escape, layers)) if ambiguous else list(layers),
        modules_to_save=old.modules_to_save,
        trainable_token_indices=getattr(old, "trainable_token_indices", None),
        fan_in_fan_out=any(type(layer.kind).__name__ == "Conv1D" for layer in layers.values()),
        lora_bias=has_bias,
    )


def _progress(items, show):
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="Converting to LoRA")
