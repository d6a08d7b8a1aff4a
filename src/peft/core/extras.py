"""What an adapter trains beside its layers: whole modules, token rows, and the ties of embedding and head."""

import warnings

from peft import registry
from peft.core import match
from peft.core.layer import AdapterLayer
from peft.core.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peft.errors import ConfigError, PeftWarning, nearest

TASK_HEADS = ("classifier", "score", "qa_outputs")  # task classes name these whether the model has them or not


def only_extras(config):
    """Whether a config that adapts no layer still trains something."""
    return bool(config.modules_to_save or getattr(config, "trainable_token_indices", None))


def add(tuner, name, config, how):
    """Wrap the modules that `config` trains whole (modules_to_save) or by row (trainable_token_indices)."""
    add_saved_modules(tuner.model, name, config, tuner.state, empty=how["empty"])
    if getattr(config, "trainable_token_indices", None):
        _add_tokens(tuner, name, config, how)


def add_saved_modules(model, name, config, state, empty=False):
    """Give each module that config.modules_to_save names a copy for adapter `name`."""
    names = list(getattr(config, "modules_to_save", None) or ())
    if not names:
        return
    keys, wrapped, used = [], [], set()
    for key, path, module in list(match.walk(model)):
        keys.append(key)
        hits = [n for n in names if key.endswith(n)]  # an ending of the whole name, not at a dot: "norm" is any norm
        used.update(hits)
        if not hits or any(key.startswith(f"{k}.") for k in wrapped):
            continue
        wrapped.append(key)
        if isinstance(module, TrainableTokensWrapper):
            raise ConfigError(
                f"{key} is in both modules_to_save and trainable_token_indices; modules_to_save trains all of it, so "
                "leave it out of trainable_token_indices."
            )
        if not isinstance(module, ModulesToSaveWrapper):
            module = ModulesToSaveWrapper(module, state=state)
            match.put(model, path, module)
        module.update(name, empty=empty)
        (module.frozen.add if config.inference_mode else module.frozen.discard)(name)
    for entry in names:
        if entry not in used and entry not in TASK_HEADS:
            warnings.warn(
                f"modules_to_save names {entry!r}, which matches nothing in the model. Nearest: {nearest(entry, keys)}",
                PeftWarning,
                stacklevel=5,
            )
    if tied := tied_embeddings(model):
        _tie_saved_modules(model, name, config, tied, state, empty)


def _tie_saved_modules(model, name, config, tied, state, empty):
    """Where embedding and head share their weight, let their copies share it too, if asked."""
    wrapped = [m for m in tied if isinstance(m, ModulesToSaveWrapper) and name in m.adapter_names]
    if not wrapped:
        return
    if not getattr(config, "ensure_weight_tying", False):
        warnings.warn(tie_warning("modules_to_save"), PeftWarning, stacklevel=6)
        return
    for module in tied:
        if module not in wrapped and not isinstance(module, ModulesToSaveWrapper):
            path = next(p for _, p, m in match.walk(model) if m is module)
            module = ModulesToSaveWrapper(module, state=state)
            match.put(model, path, module)
        if module not in wrapped:
            module.update(name, empty=empty)
        module.modules_to_save[name].weight = wrapped[0].modules_to_save[name].weight


def _add_tokens(tuner, name, config, how):
    indices = config.trainable_token_indices
    model = tuner.model
    if not isinstance(indices, dict):
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        path = next((k for k, _, m in match.walk(model) if m is embedding), None)
        if path is None:
            raise ConfigError(
                "trainable_token_indices is a list, but the model does not say which layer embeds its input. "
                "Give a dict from the layer's name to the token ids."
            )
        indices = {path: indices}
    tied = tied_embeddings(model)
    by_module = {}
    for target, tokens in indices.items():
        names = match.Names([target])
        found = [(path, m) for key, path, m in match.walk(model) if names.match(key)]
        if not found:
            raise ConfigError(f"trainable_token_indices names {target!r}, which is no module of the model.")
        for path, module in found:
            if isinstance(module, ModulesToSaveWrapper):
                raise ConfigError(
                    f"{target} is in both modules_to_save and trainable_token_indices; modules_to_save trains all of "
                    "it, so leave it out of trainable_token_indices."
                )
            by_module[path] = (module, list(tokens))
    wants_tie = getattr(config, "ensure_weight_tying", False)
    host = None
    for path, (module, tokens) in by_module.items():
        on_tie = any(_base(module) is _base(t) for t in tied)
        if on_tie and host is not None and wants_tie and tokens == host[1]:
            continue  # follows below
        wrapper = _token_wrapper(tuner, path, module, name, tokens, config, how)
        if on_tie:
            host = host or (wrapper, tokens)
    if host is None:
        return
    for module in tied_embeddings(model):  # the other side of the tie follows, with the very same rows
        path = next((p for _, p, m in match.walk(model) if m is module), None)
        if path is None or (isinstance(module, TrainableTokensWrapper) and name in module.adapter_names):
            continue
        twin = _token_wrapper(tuner, path, module, name, host[1], config, how)
        layer, source = twin.token_adapter, host[0].token_adapter
        layer._modules["trainable_tokens_delta"] = source._modules["trainable_tokens_delta"]
        layer.adapters[name].borrowed = True


def _base(module):
    while isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, AdapterLayer) else module.original_module
    return module


def _token_wrapper(tuner, path, module, name, tokens, config, how):
    token_method = registry.method("TRAINABLE_TOKENS")
    wrapper = module
    if not isinstance(module, TrainableTokensWrapper):
        wrapper = TrainableTokensWrapper(module, token_method.tuner.layer_cls, tuner.state)
        match.put(tuner.model, path, wrapper)
    rows = token_method.config(token_indices=tokens, inference_mode=config.inference_mode)
    wrapper.update(name, rows, **how)
    (wrapper.frozen.add if config.inference_mode else wrapper.frozen.discard)(name)
    return wrapper


# -- tied embeddings ---------------------------------------------------------------------------------------------
def tied_embeddings(model):
    """[input embedding, output head] as they stand in the model where they share their weight, else []."""
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        return []
    try:
        pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    weights = [getattr(_base(m), "weight", None) for m in pair]
    return pair if weights[0] is not None and weights[0] is weights[1] else []


def tie_warning(field):
    return (
        f"The model has tied weights, and {field} covers one of the tied layers: what is trained there does not reach "
        "the other one. Merging unties them. Set ensure_weight_tying=True in the config to train both as one."
    )


def tie_adapters(tuner, name, config, how):
    """Where an adapted layer is tied to another: warn, or adapt the other with the same tensors if asked."""
    tied = tied_embeddings(tuner.model)
    adapted = [m for m in tied if isinstance(m, AdapterLayer) and name in m.adapters]
    wants = getattr(config, "ensure_weight_tying", False)
    if not tied or not adapted:
        covered = tied and any(isinstance(m, AuxiliaryTrainingWrapper) for m in tied)
        if wants and not covered:
            warnings.warn(
                "You have requested ensure_weight_tying, but no tied modules were found in the model"
                + (" among the targets." if tied else "."),
                PeftWarning,
                stacklevel=5,
            )
        return
    if not (wants or tuner.layer_cls.adapter_cls.follows_ties):
        warnings.warn(tie_warning("target_modules"), PeftWarning, stacklevel=5)
        return
    embedding, head = tied
    host = next(p for _, p, m in match.walk(tuner.model) if m is embedding)
    other = next(p for _, p, m in match.walk(tuner.model) if m is head)
    source = tuner._layer_at(host, embedding)
    if name not in source.adapters:
        source.add_adapter(name, config, host, **how)
    target = tuner._layer_at(other, head)
    tuner.layer_cls.adapter_cls.tie(target, source, name, other)


def fix_tie_flag(model):
    """Say in the model's config that embedding and head are no longer tied, where merging has parted them."""
    config = getattr(model, "config", None)
    tie = getattr(config, "tie_word_embeddings", False)
    if tie and hasattr(model, "get_output_embeddings") and (head := model.get_output_embeddings()) is not None:
        embedding = model.get_input_embeddings()
        if getattr(head, "weight", None) is not getattr(embedding, "weight", None):
            warnings.warn(
                "Merging changed one of the tied embedding and head, so they are no longer tied: "
                "tie_word_embeddings is set to False in the model's config.",
                PeftWarning,
                stacklevel=4,
            )
            config.tie_word_embeddings = False


def merged_module(wrapper, active):
    """What stays in the model in place of a wrapper when adapters are merged."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        chosen = next((n for n in active if n in wrapper.adapter_names), None)
        return wrapper.original_module if chosen is None else wrapper.modules_to_save[chosen]
    return wrapper.original_module


def hosted_layer(wrapper):
    """The adapted layer inside a token wrapper, or None."""
    return wrapper.token_adapter if isinstance(wrapper, TrainableTokensWrapper) else None
