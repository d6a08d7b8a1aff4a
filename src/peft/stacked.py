"""PeftStackedModel: adapters of any methods on one model, acting together; a prompt may stand in front of the batch."""

import contextlib
import json
import os

from peft import registry
from peft.config import PeftConfig
from peft.core.compose import Composition, Stack, read_composition
from peft.errors import AdapterError, CheckpointError, ConfigError, MergeError
from peft.loading import requires_grad_of, restore_requires_grad
from peft.mixed import MixedModel, PeftMixedModel
from peft.model import PeftModel
from peft.storage import hub
from peft.storage.files import commit_files, read_json
from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

STACK_NAME = "adapter_stack.json"


class StackedModel(MixedModel):
    """A tuner for all methods that are nothing more than adapted layers."""

    @classmethod
    def check(cls, config):
        method = registry.method(config.peft_type)
        if method.tuner is None or not method.tuner.injectable:
            raise ConfigError(f"{method.name} needs a model of its own, so it cannot be one of several adapters.")

    def delete_adapter(self, adapter_name):
        fused = [n for n, c in self.peft_config.items() if adapter_name in (getattr(c, "adapters", None) or ())]
        if fused:
            raise AdapterError(f"Adapter {adapter_name!r} is mixed by {fused[0]!r}; delete that first.")
        super().delete_adapter(adapter_name)

    def file_path(self, path):
        """Without the wrappers around it: a file says what its adapter is on, not what else was there."""
        return path.replace(".base_layer", "")


class PeftStackedModel(PeftMixedModel):
    """A base model with several adapters, made by `get_peft_model(model, {name: config, ...})`.

    All act and are trained at first, in this order; `set_adapter` chooses, and says how they act together. Where two
    methods meet on one layer, the later one sees what the earlier made. At most one prompt acts, for all samples. The
    task's head goes with the first adapter. Raises ConfigError for adapters that cannot be together.
    """

    tuner_cls = StackedModel

    def __init__(self, model, adapters, autocast_adapter_dtype=True, low_cpu_mem_usage=False, active=None):
        on_layers = {name: c for name, c in adapters.items() if not c.is_prompt_learning}
        if not on_layers:
            raise ConfigError(
                "A stack needs at least one adapter on layers, such as LoRA; for prompts alone call "
                "get_peft_model(model, config)."
            )
        self._how = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        first = next(iter(on_layers))
        task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(on_layers[first].task_type, PeftModel)
        task._add_task_modules(on_layers[first])
        super().__init__(model, on_layers[first], first, **self._how)
        self.__dict__["prompts"] = None  # a PeftModel around the same base; unregistered, or all would be there twice
        try:
            for name, config in adapters.items():
                if name != first:
                    self.add_adapter(name, config, **self._how)
            self.set_adapter(list(adapters) if active is None else active)
        except BaseException:
            self.base_model.unload()
            raise

    # -- what there is -------------------------------------------------------------------------------------------
    @property
    def peft_config(self):
        return {**self.base_model.peft_config, **self._prompt_configs()}

    def _prompt_configs(self):
        prompts = self.__dict__.get("prompts")
        return {} if prompts is None else prompts.peft_config

    @property
    def active_adapters(self):
        return [*self.state.active, *(self.prompts.active_adapters if self.prompts is not None else ())]

    active_adapter = active_adapters

    def _acting(self):
        """What `set_adapter` takes to come to the present state: names, or a composition, and the prompt."""
        prompts = [] if self.prompts is None else self.prompts.active_adapters
        return [*(self.state.active if self.state.block is None else [self.state.block]), *prompts]

    # -- computing -----------------------------------------------------------------------------------------------
    def forward(self, *args, adapter_names=None, **kwargs):
        """The base model's forward under the active adapters; see PeftModel.forward."""
        return self._governed(self._base() or self.base_model, adapter_names, args, kwargs)

    def generate(self, *args, adapter_names=None, **kwargs):
        """The base model's generate under the active adapters; see PeftModel.generate."""
        run = (self._base() or self.base_model).generate
        return self._governed(run, adapter_names, args, kwargs, self.base_model.during_generate)

    def _base(self):
        """The PeftModel that puts the acting prompt in front, or None for none."""
        return self.prompts if self.prompts is not None and self.prompts.has_active_enabled_adapter else None

    def disable_adapter(self):
        """While inside, the model computes what the base model would. Leaves everything exactly as it was."""
        context = contextlib.ExitStack()
        context.enter_context(super().disable_adapter())
        if self.prompts is not None:
            context.enter_context(self.prompts.disable_adapter())
        return context

    # -- verbs ---------------------------------------------------------------------------------------------------
    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True):
        """Add an adapter of any method, not yet active. ConfigError where it cannot be with the others."""
        if not peft_config.is_prompt_learning:
            super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
            return
        if getattr(peft_config, "modules_to_save", None):
            raise ConfigError("A prompt in a stack cannot have modules_to_save; give them to an adapter on layers.")
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.")
        acting = self._acting()
        if self.prompts is None:
            self.__dict__["prompts"] = PeftModel(self.get_base_model(), peft_config, adapter_name)
            self.prompts.prompt_state.active = ()
            self.prompt_encoder = self.prompts.prompt_encoder
        else:
            self.prompts._add_prompt(adapter_name, peft_config)  # of any prompt method, where add_adapter takes one
        self.set_adapter(acting)

    def set_adapter(self, adapter_name, inference_mode=False):
        """Let these act, and no others: a name, a composition, or a list of such, the first acting first."""
        chosen = [adapter_name] if isinstance(adapter_name, (str, Composition)) else list(adapter_name)
        self._known([n for c in chosen for n in _names(c)])
        prompts = [c for c in chosen if isinstance(c, str) and c in self._prompt_configs()]
        on_layers = [c for c in chosen if not isinstance(c, str) or c not in prompts]
        if len(prompts) > 1:
            raise AdapterError(f"At most one prompt acts at a time, got {prompts}.")
        if any(isinstance(c, Composition) for c in on_layers):
            on_layers = on_layers[0] if len(on_layers) == 1 else Stack(*on_layers)
        self.base_model.set_adapter(on_layers, inference_mode=inference_mode)
        if self.prompts is not None:
            self.prompts.prompt_state.active = tuple(prompts)
            for name, encoder in self.prompts.prompt_encoder.items():
                frozen = inference_mode or self.peft_config[name].inference_mode
                encoder.set_trainable(name in prompts and not frozen)

    def delete_adapter(self, adapter_name):
        """Remove adapters. Raises ValueError for unknown ones and for the last one on layers."""
        for name in self._known(adapter_name):
            if name not in self._prompt_configs():
                self.base_model.delete_adapter(name)
                continue
            self.prompts.prompt_state.active = ()
            self.prompts.delete_adapter(name)
            if not self.prompts.peft_config:
                del self.prompt_encoder
                self.__dict__["prompts"] = None

    def merge_and_unload(self, *args, **kwargs):
        """The base model with the active adapters in its weights; this object is used up."""
        if self._base() is not None:
            raise MergeError(
                f"The prompt {self.prompts.active_adapter!r} is active, and no weight does what it does. Activate the "
                "other adapters alone to merge them."
            )
        return self.base_model.merge_and_unload(*args, **kwargs)

    # -- files ---------------------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory, selected_adapters=None, **options):
        """Write each adapter into a folder of its name, as PeftModel does, and how they act together beside them.

        Other programs can load each of these folders on its own. Of what acts, that is written whose adapters are all
        selected; without such, the selected ones on layers act after loading. options: see
        `peft.saving.save_pretrained`.
        """
        from peft.saving import save_pretrained

        chosen = list(self.peft_config) if selected_adapters is None else self._known(selected_adapters)
        for name in chosen:
            holder = self.prompts if name in self._prompt_configs() else self
            folder = os.path.join(save_directory, name) if name == "default" else save_directory
            save_pretrained(holder, folder, selected_adapters=[name], **options)
        acting = [a for a in self._acting() if set(chosen).issuperset(_names(a))]
        acting = acting or [name for name in chosen if name not in self._prompt_configs()]
        active = [a.to_json() if isinstance(a, Composition) else a for a in acting]
        how = {"adapters": chosen, "active": active}
        commit_files(save_directory, {STACK_NAME: json.dumps(how, indent=2).encode()})

    @classmethod
    def from_pretrained(cls, model, model_id, is_trainable=False, **kwargs):
        """A base model with the adapters of a folder that `save_pretrained` wrote. kwargs: as for `load_adapter`.

        Raises ValueError where it is no such folder, CheckpointError where a file is damaged.
        """
        path = hub.find_file(model_id, STACK_NAME)
        if path is None:
            raise ValueError(f"{model_id} has no {STACK_NAME}; PeftModel.from_pretrained loads single adapters.")
        how = read_json(path)
        try:
            names, active = list(how["adapters"]), [read_composition(a) for a in how["active"]]
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Save the adapters again.") from error
        configs = {name: PeftConfig.from_pretrained(model_id, subfolder=name) for name in names}
        for config in configs.values():
            config.inference_mode = not is_trainable
        trainable = requires_grad_of(model)
        stacked = cls(model, configs, low_cpu_mem_usage=True, active=active)
        try:
            for name in names:
                holder = stacked.prompts if configs[name].is_prompt_learning else stacked
                holder.load_adapter(model_id, name, is_trainable=is_trainable, subfolder=name, **kwargs)
        except BaseException:
            stacked.base_model.unload()
            restore_requires_grad(trainable)
            raise
        stacked.set_adapter(active)
        return stacked.train(is_trainable)


def _names(acting):
    """The adapters of a name or a composition."""
    return acting.names if isinstance(acting, Composition) else [acting]
