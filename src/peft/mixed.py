"""PeftMixedModel: adapters of several methods on one model. Their wrappers nest where they meet on a layer."""

import contextlib

from torch import nn

from peft import registry
from peft.config import PeftConfig
from peft.core import extras
from peft.core.compose import Composition
from peft.core.tuner import Tuner
from peft.errors import AdapterError
from peft.model import PeftModel


def __getattr__(name):
    if name == "COMPATIBLE_TUNER_TYPES":  # asking the registry imports every method, so not before it is asked for
        return tuple(registry.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class MixedModel(Tuner):
    """A tuner for all methods: it walks the layers of all, and lets each method's own tuner inject its adapters."""

    def inject_adapter(self, model, adapter_name, config=None, **how):
        """Add one adapter; nothing of it stays behind if that fails. Raises ValueError for methods that cannot mix."""
        config = self.peft_config[adapter_name] if config is None else config
        self.check(config)
        self.as_method(config.peft_type).inject_adapter(model, adapter_name, config, **how)

    def call_arguments(self, args, kwargs):
        found = {}
        for tuner in self._tuners():
            found |= tuner.call_arguments(args, kwargs)
        return found

    @classmethod
    def check(cls, config):
        """Raise ValueError for a method that cannot share a model with others."""
        if not registry.method(config.peft_type).mixed:
            types = tuple(registry.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
            raise ValueError(
                f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`. "
                f"Compatible types are: {types}"
            )

    def file_form(self, name, tensors, config, plain=False):
        return self.as_method(config.peft_type).file_form(name, tensors, config, plain)

    def own_slots(self, adapter_name):
        return self.as_method(self.peft_config[adapter_name].peft_type).own_slots(adapter_name)

    @contextlib.contextmanager
    def during_generate(self, arguments):
        with contextlib.ExitStack() as stack:
            for tuner in self._tuners():
                stack.enter_context(tuner.during_generate(arguments))
            yield

    def _tuners(self):
        return [self.as_method(peft_type) for peft_type in {c.peft_type for c in self.peft_config.values()}]

    def as_method(self, peft_type):
        """The method's own tuner on the very same model, layers, configs and active record."""
        cls = registry.method(peft_type).tuner
        tuner = cls.__new__(cls)
        object.__setattr__(tuner, "__dict__", self.__dict__)
        return tuner


class PeftMixedModel(nn.Module):
    """A base model with adapters of one or more methods, made by `get_peft_model(..., mixed=True)`.

    Several adapters may be active at once; on one layer the method that was added last sees what the earlier ones made.
    Such models cannot be saved; save each adapter from a PeftModel instead.
    """

    _is_prompt_learning = False
    tuner_cls = MixedModel

    def __init__(
        self, model, peft_config, adapter_name="default", autocast_adapter_dtype=True, low_cpu_mem_usage=False, **kwargs
    ):
        super().__init__()
        self.tuner_cls.check(peft_config)
        self._adapters_disabled = False
        PeftModel._fill_base_name(peft_config, model)
        self.base_model = self.tuner_cls(
            model,
            {adapter_name: peft_config},
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        if getattr(model, "is_gradient_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(model)

    # What is the same as for one method. (No subclass: code that asks for a PeftModel wants to save it.)
    forward, generate = PeftModel.forward, PeftModel.generate
    _governed, _choosing = PeftModel._governed, PeftModel._choosing
    disable_adapter = PeftModel.disable_adapter
    get_nb_trainable_parameters = PeftModel.get_nb_trainable_parameters
    print_trainable_parameters = PeftModel.print_trainable_parameters
    prepare_model_for_gradient_checkpointing = PeftModel.prepare_model_for_gradient_checkpointing
    load_adapter = PeftModel.load_adapter
    _settle_meta_tensors, _make_room_for_tokens = PeftModel._settle_meta_tensors, PeftModel._make_room_for_tokens
    modules_to_save = PeftModel.modules_to_save
    has_active_enabled_adapter = PeftModel.has_active_enabled_adapter
    set_requires_grad = PeftModel.set_requires_grad

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self):
        return self.base_model.peft_config

    @property
    def state(self):
        """The active record that all layers read."""
        return self.base_model.state

    @property
    def active_adapters(self):
        return list(self.state.active)

    active_adapter = active_adapters

    def get_base_model(self):
        """The base model (with its adapted layers in it)."""
        return self.base_model.model

    def _known(self, names):
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [n for n in names if n not in self.peft_config]:
            raise AdapterError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")
        return names

    # -- verbs ---------------------------------------------------------------------------------------------------
    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True):
        """Add an adapter of any method that can mix, neither active nor trained yet. ValueError for a taken name."""
        self.tuner_cls.check(peft_config)
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.")
        PeftModel._fill_base_name(peft_config, self.get_base_model())
        self.base_model.inject_adapter(
            self.get_base_model(),
            adapter_name,
            peft_config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def set_adapter(self, adapter_name, inference_mode=False):
        """Let these adapters, or a composition of them, act, and no others. Raises ValueError for unknown names."""
        names = self._known(adapter_name.names if isinstance(adapter_name, Composition) else adapter_name)
        chosen = adapter_name if isinstance(adapter_name, Composition) else names
        self.base_model.set_adapter(chosen, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name):
        """Remove adapters. Raises ValueError for unknown names."""
        for name in self._known(adapter_name):
            self.base_model.delete_adapter(name)

    def set_modules_to_save(self, peft_config, adapter_name):
        """Give the modules that the config trains whole a copy for an adapter."""
        extras.add_saved_modules(self.get_base_model(), adapter_name, peft_config, self.state)
        self.base_model._collect()

    def merge_and_unload(self, *args, **kwargs):
        """The base model with the active adapters in its weights; this object is used up."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self):
        """The base model as it was before any adapter."""
        return self.base_model.unload()

    # -- what mixed models do not have -----------------------------------------------------------------------------
    def get_layer_status(self):
        """Raises TypeError."""
        raise TypeError("get_layer_status is not supported for PeftMixedModel.")

    def get_model_status(self):
        """Raises TypeError."""
        raise TypeError("get_model_status is not supported for PeftMixedModel.")

    def save_pretrained(self, *args, **kwargs):
        """Raises NotImplementedError."""
        raise NotImplementedError("Saving is not supported for PeftMixedModel (yet); save each adapter on its own.")

    push_to_hub = save_pretrained

    def create_or_update_model_card(self, output_dir):
        """Raises NotImplementedError."""
        raise NotImplementedError("Model card creation is not supported for PeftMixedModel (yet).")

    @classmethod
    def from_pretrained(cls, model, model_id, adapter_name="default", is_trainable=False, config=None, **kwargs):
        """A base model with an adapter from a folder or the hub; add others with `load_adapter`."""
        config = config or PeftConfig.from_pretrained(model_id, **kwargs)
        config.inference_mode = not is_trainable
        mixed = cls(model, config, adapter_name, low_cpu_mem_usage=True)
        mixed.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        return mixed
