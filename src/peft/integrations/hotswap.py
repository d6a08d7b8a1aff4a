"""Put another LoRA into an adapter's place without touching the model's structure: compiled models stay compiled."""

import warnings

import torch

from peft.config import PeftConfig
from peft.core.checkpoint import PREFIX, adapter_slots, registry_of, tuner_parts
from peft.enums import PeftType
from peft.errors import AdapterError, AdapterMismatchError, ConfigError, PeftWarning
from peft.methods.lora import factors
from peft.methods.lora.lora import LoraLayer
from peft.weights import infer_device, load_peft_weights

CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}


def hotswap_adapter(model, model_name_or_path, adapter_name, torch_device=None, **kwargs):
    """Replace the values of adapter `adapter_name` by those of an adapter from a folder or the hub.

    kwargs: hub options. Raises as `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict` do.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    configs = tuner_parts(_original(model))[2]
    if adapter_name not in configs:
        raise AdapterError(f"Adapter {adapter_name!r} does not exist; there are {list(configs)}.")
    check_hotswap_configs_compatible(configs[adapter_name], config)
    tensors = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, parameter_prefix="lora_"):
    """Replace the values of a LoRA by tensors of another one, of any rank, and its scaling by what `config` says.

    Keys as in a file or as in the model. Layers that the tensors leave out no longer change anything. A rank above the
    adapter's needs new tensors, and so a compiled model compiles again. Nothing has changed where an error is raised:
    AdapterMismatchError (a RuntimeError) for keys or shapes that do not fit, AdapterError (a ValueError) while the
    adapter is merged, or where one of the two subtracts a start from its update.
    """
    compiled, model = _is_compiled(model), _original(model)
    adapters = _adapters(model, adapter_name)
    _check_swappable(adapters, adapter_name, config)
    tensors = _by_place(model, state_dict, adapter_name, parameter_prefix)
    swaps = [(a, _incoming(a, tensors)) for a in adapters if a.twin is None]
    grows = any(len(new[0]) > len(a.factors()[0]) for a, new in swaps if new)
    if grows and (compiled or any(map(_is_compiled, model.modules()))):
        warnings.warn(
            "The new adapter has a larger rank than the tensors in place; with new ones the model will compile again. "
            "To avoid that, call prepare_model_for_compiled_hotswap(model, target_rank=<the largest rank>) before "
            "compiling.",
            PeftWarning,
            stacklevel=2,
        )
    with torch.no_grad():
        for adapter, new in swaps:
            _replace(adapter, new)
        for adapter in adapters:
            adapter.r, adapter.lora_alpha, scaling = adapter.scale_of(config)
            adapter.use_rslora = config.use_rslora
            _set_scaling(adapter, scaling)
    _describe(tuner_parts(model)[2].get(adapter_name), config, max(len(a.factors()[0]) for a in adapters))


def prepare_model_for_compiled_hotswap(model, *, target_rank=None, config=None, check_compiled="error"):
    """Make room for adapters of any rank up to `target_rank`, so that swapping them in needs no new compilation.

    Call it after the first adapter was loaded and before the model is compiled. Factors are filled up with zeros;
    scalings become tensors. config: also tell this LoraConfig, or dict of them, the new rank. check_compiled: "error",
    "warn" or "ignore" where the model is compiled already. Raises ValueError for that, for a model without LoRA, and
    for a target_rank below a rank that is in use.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r}.")
    if _is_compiled(model) and check_compiled != "ignore":
        if check_compiled == "error":
            raise AdapterError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
            "result in re-compilation, hurting performance. Call the function before compiling the model.",
            PeftWarning,
            stacklevel=2,
        )
    adapters = _adapters(_original(model))
    if not adapters:
        raise AdapterError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    if target_rank is not None:
        largest = max(len(a.factors()[0]) for a in adapters)
        if largest > target_rank:
            raise AdapterError(
                f"target_rank is {target_rank}, but an adapter on the model has rank {largest} already: give the "
                "largest rank of all adapters to come."
            )
    with torch.no_grad():
        for adapter in adapters:
            if target_rank is not None and adapter.twin is None and len(adapter.factors()[0]) < target_rank:
                _check_resizable(adapter)
                _put(adapter, *factors.widened(*adapter.factors(), target_rank))
            _set_scaling(adapter, torch.tensor(float(adapter.scaling), device=adapter.factors()[0].device))
    if target_rank is not None and config is not None:
        for c in config.values() if isinstance(config, dict) else [config]:
            _raise_rank(c, target_rank)


def check_hotswap_configs_compatible(config0, config1):
    """Raise ValueError where an adapter of one config cannot take the place of one of the other."""
    if config0.peft_type != config1.peft_type:
        found = f"{config0.peft_type.value} and {config1.peft_type.value}"
        raise ConfigError(f"Incompatible PEFT types found: {found}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ConfigError(
            f"Hotswapping only supports {', '.join(t.value for t in CONFIG_KEYS_TO_CHECK)} but "
            f"{config0.peft_type.value} was passed."
        )
    for key in CONFIG_KEYS_TO_CHECK[config0.peft_type]:
        old, new = getattr(config0, key), getattr(config1, key)
        if old != new:
            raise ConfigError(f"Configs are incompatible: for {key}, {old} != {new}")


# -- looking -------------------------------------------------------------------------------------------------------
def _original(model):
    """The model below torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def _is_compiled(module):
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _adapters(model, name=None):
    """The LoRA adapters of a model: of one name, or all."""
    layers, _ = registry_of(model, tuner_parts(model)[1])
    lora = [layer for layer in layers.values() if isinstance(layer, LoraLayer)]
    return [a for layer in lora for n, a in layer.adapters.items() if name in (None, n)]


def _check_swappable(adapters, name, config):
    if not adapters:
        raise AdapterError(f"The model has no LoRA adapter {name!r} to put another one in place of.")
    if any(name in a.layer.merged_adapters for a in adapters):
        raise AdapterError(
            f"Cannot hot-swap adapter {name!r} because it is currently merged into the base weights. Please unmerge "
            "the adapter first by calling `peft_model.unmerge_adapter()` (or, for diffusers models, "
            "`diffusers_model.unfuse_lora()`)."
        )
    mode = config.init_lora_weights
    if any(a.lora_start_A is not None for a in adapters) or str(mode).startswith(("pissa", "olora")):
        raise AdapterError(
            "Adapters initialised by pissa or olora subtract their start from the update, so they cannot be swapped. "
            "Convert them to plain LoRA with peft.save_as_lora."
        )
    if config.kasa_config is not None or any(a.title == "KaSA" for a in adapters):
        raise AdapterError(
            "A KaSA adapter also takes small components of the base weight away, so it cannot be swapped. Load it as "
            "an adapter of its own and activate that."
        )


def _by_place(model, state_dict, name, parameter_prefix):
    """{(id of the owner, name in it): tensor}. Raises AdapterMismatchError for keys without a place, or no keys."""
    slots = [s for s in adapter_slots(model, name) if f".{parameter_prefix}" in s.key]
    places = {key: (id(s.owner), s.name) for s in slots for key in (s.key, s.file_key)}  # tied ones have no owner
    if not tuner_parts(model)[0]:
        state_dict = {key.removeprefix(PREFIX): t for key, t in state_dict.items()}
    unexpected = [key for key in state_dict if key not in places]
    if unexpected:
        raise AdapterMismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        )
    if not state_dict:
        raise AdapterMismatchError("Hot swapping the adapter did not succeed: there are no tensors to swap in.")
    return {places[key]: t for key, t in state_dict.items()}


def _incoming(adapter, tensors):
    """(A, B, bias or None, magnitude or None) for one layer; None where the tensors leave it out.

    Raises AdapterMismatchError where a part is missing or does not fit.
    """
    slots = {adapter.file_key(s.key, adapter.name): s for s in adapter.saved_slots()}
    new = {n: tensors[id(s.owner), s.name] for n, s in slots.items() if (id(s.owner), s.name) in tensors}
    if not new:
        return None
    names = ("lora_embedding_A", "lora_embedding_B") if adapter.lora_A is None else ("lora_A.weight", "lora_B.weight")
    bias, magnitude = new.get("lora_B.bias"), new.get("lora_magnitude_vector")
    (A, B), (old_A, old_B) = map(new.get, names), adapter.factors()
    fits = A is not None and B is not None and A.ndim == old_A.ndim and B.ndim == old_B.ndim and len(A)
    fits = fits and A.shape[1:] == old_A.shape[1:] and B.shape[2:] == old_B.shape[2:] and len(B) == len(old_B)
    fits = fits and B.shape[1] * len(old_A) == old_B.shape[1] * len(A)
    fits = fits and all(new[n].shape == slots[n].tensor.shape for n in new if n not in names)
    if not fits or (adapter.lora_magnitude_vector is not None and magnitude is None):
        raise AdapterMismatchError(
            f"Hot swapping the adapter did not succeed: the tensors for {adapter.key} are "
            f"{ {n: tuple(t.shape) for n, t in new.items()} }, in place of "
            f"{ {n: tuple(s.tensor.shape) for n, s in slots.items()} }."
        )
    if len(A) != len(old_A):
        _check_resizable(adapter)
    return A, B, bias, magnitude


def _check_resizable(adapter):
    if adapter.kind.name == "param":
        raise NotImplementedError(f"{adapter.key} is a bare parameter: its LoRA cannot change its rank.")


# -- writing -------------------------------------------------------------------------------------------------------
def _replace(adapter, new):
    """Write one layer's new tensors; new=None: make the adapter change nothing there."""
    A, B = adapter.factors()
    if new is None:
        new = torch.zeros_like(A), torch.zeros_like(B), None, adapter.base_weight().float().flatten(1).norm(dim=1)
    new_A, new_B, bias, magnitude = new
    wide = factors.widened(new_A, new_B, max(len(new_A), len(A)))
    if len(wide[0]) > len(A):
        _put(adapter, *wide)
    else:
        A.copy_(wide[0])
        B.copy_(wide[1])
    if adapter.lora_B is not None and (old := adapter.lora_B._parameters.get("bias")) is not None:
        old.zero_() if bias is None else old.copy_(bias)
    if adapter.lora_magnitude_vector is not None:
        old = adapter.lora_magnitude_vector.weight
        old.copy_(magnitude.reshape(old.shape))


def _put(adapter, A, B):
    """Give an adapter factors of another rank, as new modules of the right size."""
    old_A, old_B = adapter.factors()
    bias = None if adapter.lora_B is None else adapter.lora_B._parameters.get("bias")
    where = {"device": old_A.device, "dtype": old_A.dtype}
    new = adapter.kind.factors(adapter.base, len(A), bias is not None, **where)
    if adapter.lora_A is None:
        adapter.lora_embedding_A, adapter.lora_embedding_B = new
    else:
        adapter.lora_A, adapter.lora_B = (m.train(adapter.training) for m in new)
    for p, value, old in zip(adapter.factors(), (A, B), (old_A, old_B)):
        p.copy_(value)
        p.requires_grad = old.requires_grad
    if bias is not None:
        adapter.lora_B.bias.copy_(bias)
        adapter.lora_B.bias.requires_grad = bias.requires_grad
    adapter.layer.banks.clear()


def _set_scaling(adapter, value):
    """A tensor in place stays the same one: compiled code has it as an input."""
    if isinstance(adapter.scaling, torch.Tensor) and not isinstance(value, torch.Tensor):
        adapter.scaling.fill_(value)
    else:
        adapter.scaling = value


def _describe(config, new, rank):
    """Let the model's config say what its tensors, perhaps filled up to `rank`, amount to."""
    if config is None:
        return
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        setattr(config, field, getattr(new, field))
    if rank > config.r and not config.rank_pattern and not config.alpha_pattern:
        _raise_rank(config, rank)


def _raise_rank(config, rank):
    """Set a config's ranks, keeping its scaling where no pattern gives single layers their own."""
    if not config.rank_pattern and not config.alpha_pattern:
        alpha = config.lora_alpha * config.scaling(config.r, 1) / config.scaling(rank, 1)
        config.lora_alpha = int(alpha) if alpha == int(alpha) else alpha
    config.r, config.rank_pattern = rank, dict.fromkeys(config.rank_pattern, rank)
