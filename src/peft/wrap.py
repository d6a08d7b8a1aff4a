"""get_peft_model: a model in, a PeftModel out."""

import warnings

from peft.core.layer import AdapterLayer
from peft.model import PeftModel


def get_peft_model(
    model,
    peft_config,
    adapter_name="default",
    mixed=False,
    autocast_adapter_dtype=True,
    revision=None,
    low_cpu_mem_usage=False,
):
    """Give a model an adapter: freeze the model, and return it wrapped so that the adapter is trained.

    peft_config: a config, or {adapter name: config} for several methods at once, which gives a PeftStackedModel. Else
    the class follows from peft_config.task_type. mixed: a PeftMixedModel, which can hold several methods.
    autocast_adapter_dtype: adapter weights of a half-precision model are float32. low_cpu_mem_usage: on the meta
    device, for a loader. Raises ConfigError, NoMatchingPeftModuleError or ValueError where config and model do not fit.
    """
    from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    if hasattr(model, "peft_config") and any(isinstance(m, AdapterLayer) for m in model.modules()):
        warnings.warn(
            "The model carries adapters already, and is wrapped for a second time. To start over with another config, "
            "call .unload() on the first PeftModel before.",
            stacklevel=2,
        )
    if isinstance(peft_config, dict):
        from peft.stacked import PeftStackedModel

        return PeftStackedModel(model, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)
    if revision is not None:
        peft_config.revision = revision
    name = model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and peft_config.base_model_name_or_path != name:
        if peft_config.base_model_name_or_path:
            warnings.warn(
                f"The config names the base model {peft_config.base_model_name_or_path!r}, but this is {name!r}: the "
                "config now says so, and loading will look for that one.",
                stacklevel=2,
            )
        peft_config.base_model_name_or_path = name
    if mixed:
        from peft.mixed import PeftMixedModel

        return PeftMixedModel(
            model, peft_config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
        )
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return cls(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
