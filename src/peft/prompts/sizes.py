"""The sizes that a prompt's config leaves open, read from the config of the base model."""

from peft.errors import ConfigError

NAMES = {  # field -> what model families call it
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
}


def first(model_config, *names):
    """The first of these attributes that the model's config has a value for, or None."""
    return next((v for n in names if (v := getattr(model_config, n, None)) is not None), None)


def text_config(base):
    """The config of the part of a model that reads text. Raises ConfigError for models without a config."""
    config = getattr(base, "config", None)
    if config is None:
        raise ConfigError(
            f"Prompt methods need a transformers model, which says its sizes in its config; {type(base).__name__} has "
            "none. Use a method that adapts layers, for example LoRA."
        )
    if is_encoder_decoder(base) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config(decoder=True)


def by_layer(model_config, name):
    """The values of a setting layer by layer, or a list of one where the config does not tell layers apart."""
    return [getattr(c, name, None) for c in getattr(model_config, "per_layer_config", None) or [model_config]]


def is_encoder_decoder(base):
    return bool(getattr(base.config, "is_encoder_decoder", False))


def fill(config, base, encoder_cls):
    """Set the open sizes of a prompt's config. Raises ConfigError, naming the field, where one cannot be told."""
    model_config = text_config(base)
    if config.num_virtual_tokens is None or config.num_virtual_tokens < 1:
        raise ConfigError(
            f"{type(config).__name__}.num_virtual_tokens must be at least 1, got {config.num_virtual_tokens}."
        )
    if config.num_transformer_submodules is None:
        two = config.task_type == "SEQ_2_SEQ_LM" or (config.task_type is None and is_encoder_decoder(base))
        config.num_transformer_submodules = 2 if two else 1
    for field, names in NAMES.items():
        if getattr(config, field) is None:
            setattr(config, field, first(model_config, *names))
    encoder_cls.fill_sizes(config, model_config)
    for field in NAMES:
        if getattr(config, field) is None:
            raise ConfigError(f"The config of {type(base).__name__} does not say {field}; set it in the peft config.")
