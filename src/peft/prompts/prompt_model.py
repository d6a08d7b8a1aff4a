"""What a PeftModel does for prompt methods: hold encoders, and put the active one's prompt in front of each batch."""

import contextlib
import inspect
import threading
import warnings

import torch
from torch import nn

from peft import registry
from peft.core import extras, match
from peft.core.state import Call
from peft.core.wrappers import ModulesToSaveWrapper
from peft.errors import AdapterError, AdapterMismatchError, CheckpointError, PeftWarning
from peft.prompts import insert, sizes


# -- adapters ----------------------------------------------------------------------------------------------------
def add(model, name, config):
    """Give the model a prompt, and its own copies of the modules that it trains. A failure leaves nothing behind."""
    base = model.base_model
    encoder_cls = registry.method(config.peft_type).encoder
    sizes.fill(config, base, encoder_cls)
    embedding = base.get_input_embeddings()
    encoder = encoder_cls.make(config, embedding).to(embedding.weight.device)
    if "prompt_encoder" not in model._modules:
        model.prompt_encoder = nn.ModuleDict()
    try:
        extras.add_saved_modules(base, name, config, model.prompt_state)
    except BaseException:
        _delete_saved_modules(base, name)
        raise
    model.prompt_encoder[name] = encoder.train(model.training)
    model.peft_config[name] = config
    mark_trainable(model)


def delete(model, name):
    """Remove a prompt; if it was active, the first one left becomes active."""
    state = model.prompt_state
    _delete_saved_modules(model.base_model, name)
    del model.prompt_encoder[name], model.peft_config[name]
    if name in state.active:
        state.active = tuple(model.peft_config)[:1]
        if state.active:
            warnings.warn(
                f"Adapter {name} was active which is now deleted. Setting active adapter to {state.active[0]}.",
                PeftWarning,
                stacklevel=4,
            )
        mark_trainable(model)


def _saved_modules(base):
    return [(path, m) for _, path, m in match.walk(base) if isinstance(m, ModulesToSaveWrapper)]


def _delete_saved_modules(base, name):
    for path, wrapper in _saved_modules(base):
        wrapper.delete_adapter(name)
        if not wrapper.adapter_names:
            match.put(base, path, wrapper.original_module)


def mark_trainable(model, inference_mode=False):
    """Let the active prompt be trained, unless it was made or loaded for inference, and no other."""
    active = model.active_adapters
    for name, encoder in model.prompt_encoder.items():
        frozen = inference_mode or model.peft_config[name].inference_mode
        encoder.set_trainable(name in active and not frozen)
    for _, wrapper in _saved_modules(model.base_model):
        wrapper.mark_trainable(active, inference_mode)


def prompt_tokens(model):
    """{adapter name: the numbers of its virtual tokens}."""
    configs = model.peft_config.items()
    return {n: torch.arange(c.num_virtual_tokens * c.num_transformer_submodules) for n, c in configs}


# -- computing ---------------------------------------------------------------------------------------------------
def get_prompt(model, batch_size, task_ids=None):
    """The active prompt: (batch, virtual tokens, dim), or a cache that begins with it."""
    encoder = model.prompt_encoder[model.active_adapter]
    if encoder.where == "cache":
        from peft.prompts import cache

        return cache.filled(model.base_model, encoder, batch_size)
    return encoder(batch_size, task_ids).to(model.base_model_torch_dtype)


def forward(model, *args, adapter_names=None, task_ids=None, **kwargs):
    """The base model's forward over the prompt and the batch."""
    base = model.base_model
    kwargs.update(zip(inspect.signature(base.forward).parameters, args))
    with _chosen(model, adapter_names, kwargs) as name:
        if name is None:
            return base(**kwargs)
        encoder, config = model.prompt_encoder[name], model.peft_config[name]
        if encoder.where == "embeds":
            return encoder.run(lambda kw: base(**_with_embeds(base, encoder, config, kw, task_ids)), kwargs)
        return _forward_with_cache(base, encoder, config, kwargs)


def _forward_with_cache(base, encoder, config, kwargs):
    from peft.prompts import cache

    if insert.started(kwargs):
        return base(**_with_cache(base, encoder, config, kwargs))
    layers = cache.checkpointed_layers(base)
    batch = _with_cache(base, encoder, config, kwargs, cache.fixed if layers else cache.filled)
    prefix = batch[cache.name_of(base)]
    with cache.through_checkpoints(layers, prefix):
        output = base(**batch)
    cache.check_read(prefix, config.num_virtual_tokens)
    return output


def _with_cache(base, encoder, config, kwargs, make=None):
    """The batch with a cache that begins with the prefix, made by `make` unless it continues one."""
    from peft.prompts import cache

    batch = insert.into_cache(kwargs, base, config.num_virtual_tokens, config.task_type)
    if not insert.started(kwargs):
        empty = next((batch.pop(n) for n in insert.CACHE_NAMES if batch.get(n) is not None), None)
        batch[cache.name_of(base)] = (make or cache.filled)(base, encoder, insert.size_of(kwargs)[0], empty)
    return batch


def _with_embeds(base, encoder, config, kwargs, task_ids, generating=False):
    if insert.started(kwargs):
        return insert.after_embeds(kwargs, config.num_virtual_tokens, config.task_type)
    size = insert.size_of(kwargs)[0]
    if task_ids is not None and size != len(task_ids):  # beams
        task_ids = torch.as_tensor(task_ids).repeat_interleave(size // len(task_ids))
    prompt = encoder(size, task_ids)
    if sizes.is_encoder_decoder(base):
        if encoder.on_decoder and not generating and config.num_transformer_submodules == 2:
            kwargs = insert.into_decoder(kwargs, base, prompt[:, config.num_virtual_tokens :])
        prompt = prompt[:, : config.num_virtual_tokens]  # the encoder's half
    return insert.into_embeds(kwargs, base, prompt, config.task_type, generating)


def generate(model, *args, adapter_names=None, task_ids=None, **kwargs):
    """The base model's generate; each of its forwards in this thread gets the prompt. Tokens come out without it."""
    base = model.base_model
    kwargs.update(zip(inspect.signature(base.generate).parameters, args))
    if kwargs.get("input_ids") is None and kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    with _chosen(model, adapter_names, kwargs) as name:
        if name is None:
            return base.generate(**kwargs)
        if insert.started(kwargs):
            raise AdapterError("generate with a prompt cannot continue a cache: leave it out and pass all tokens.")
        encoder, config = model.prompt_encoder[name], model.peft_config[name]
        if encoder.where == "embeds" and sizes.is_encoder_decoder(base):
            return base.generate(**_with_embeds(base, encoder, config, kwargs, task_ids, generating=True))
        thread = threading.get_ident()

        def step(module, args, kwargs):
            if threading.get_ident() != thread:
                return None
            if kwargs.get("use_cache") is False:  # what an earlier step left behind is no cache to continue
                kwargs = {k: v for k, v in kwargs.items() if k not in insert.CACHE_NAMES}
            if encoder.where == "cache":
                return args, _with_cache(base, encoder, config, kwargs)
            return args, _with_embeds(base, encoder, config, kwargs, task_ids, generating=True)

        handle = base.register_forward_pre_hook(step, with_kwargs=True)
        try:
            return base.generate(**kwargs)
        finally:
            handle.remove()


@contextlib.contextmanager
def _chosen(model, adapter_names, kwargs):
    """Gives the name of the prompt that this call uses, or None for none."""
    state = model.prompt_state
    if adapter_names is None or not state.enabled:
        yield model.active_adapter if state.enabled else None
        return
    names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    if model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode; call model.eval().")
    if unknown := sorted(names - {Call.BASE} - set(model.peft_config)):
        raise AdapterError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {list(model.peft_config)}."
        )
    if len(names) != 1:
        raise AdapterError(
            f"Prompt methods use one adapter for all samples of a batch, got {sorted(names)}; split the batch."
        )
    name = names.pop()
    with state.during(Call([name] * insert.size_of(kwargs)[0])):
        yield None if name == Call.BASE else name


# -- files -------------------------------------------------------------------------------------------------------
def tables_to_save(model, name):
    """The tensors that a file holds of a prompt: what its encoder makes, without what it was made from."""
    return {key: t.detach() for key, t in model.prompt_encoder[name].tables().items()}


def load(model, name, tables, ignore_mismatched_sizes=False):
    """Put the tensors of a file into a prompt. Raises CheckpointError or AdapterMismatchError, changing nothing."""
    if "prompt_embeddings" not in tables:
        raise AdapterMismatchError(f"The file for adapter {name!r} has no prompt_embeddings: it is of another method.")
    if not all(t.isfinite().all() for t in tables.values()):
        raise CheckpointError(f"The prompt_embeddings of adapter {name!r} have values that are not finite.")
    try:
        model.prompt_encoder[name].load_tables(tables)
        mark_trainable(model)
    except AdapterMismatchError as error:
        if not ignore_mismatched_sizes:
            raise
        warnings.warn(f"Some weights were not loaded because their shapes differ: {error}", stacklevel=3)
