"""PeftModel: a base model with adapters, and the verbs for them."""

import contextlib
import dataclasses
import warnings

import torch
from torch import nn

from peft import quant, registry
from peft.core.calls import batch_size, is_checkpointing
from peft.core.compose import ByRow, Composition
from peft.core.state import AdapterState, Call
from peft.core.tuner import check_name
from peft.errors import AdapterError, PeftWarning
from peft.loading import Loadable
from peft.ops import onednn
from peft.storage import hub


class PeftModel(Loadable, hub.Pushable, nn.Module):
    """A base model with one or more adapters, made by `get_peft_model` or `PeftModel.from_pretrained`.

    base_model   the tuner around the base model (for prompt methods: the base model itself)
    peft_config  {adapter name: config}
    Attributes that it does not have are those of the base model.

    autocast_adapter_dtype: adapter weights of a half-precision base are float32. low_cpu_mem_usage: adapter weights are
    on the meta device until a file is loaded.
    """

    task_modules: tuple[str, ...] = ()  # names of heads that the task trains whole

    def __init__(
        self,
        model,
        peft_config,
        adapter_name="default",
        autocast_adapter_dtype=True,
        low_cpu_mem_usage=False,
        **kwargs,
    ):
        super().__init__()
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        self.peft_type = peft_config.peft_type
        self._adapters_disabled = False
        checkpointing = is_checkpointing(model)
        self._add_task_modules(peft_config)
        self._fill_base_name(peft_config, model)
        if self._is_prompt_learning:
            check_name(adapter_name)
            for p in model.parameters():
                p.requires_grad = False
            self._peft_config = {}
            self.prompt_state = AdapterState([adapter_name])
            self.base_model = model
            quant.attach(model)
            onednn.attach(model)
            self._add_prompt(adapter_name, peft_config)
        else:
            self._peft_config = None
            self.base_model = registry.method(self.peft_type).tuner(
                model,
                {adapter_name: peft_config},
                adapter_name,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        if checkpointing:
            self.prepare_model_for_gradient_checkpointing(model)
        if getattr(getattr(model, "config", None), "pretraining_tp", 1) != 1:
            model.config.pretraining_tp = 1  # sliced matrix products would bypass the adapters

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # -- what there is -------------------------------------------------------------------------------------------
    @property
    def peft_config(self):
        return self.base_model.peft_config if self._peft_config is None else self._peft_config

    @peft_config.setter
    def peft_config(self, value):
        if self._peft_config is None:
            self.base_model.peft_config = value
        else:
            self._peft_config = value

    @property
    def state(self):
        """The active record that all parts of the model read."""
        return self.prompt_state if self._is_prompt_learning else self.base_model.state

    @property
    def active_adapters(self):
        return list(self.state.active)

    @property
    def active_adapter(self):
        return next(iter(self.state.active), None)

    @property
    def active_peft_config(self):
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self):
        return self.state.enabled and bool(self.state.active)

    @property
    def base_model_torch_dtype(self):
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self):
        """Names of the modules that some adapter trains whole, or None."""
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    def get_base_model(self):
        """The base model (with its adapted layers in it)."""
        return self.base_model if self._is_prompt_learning else self.base_model.model

    def get_nb_trainable_parameters(self):
        """(trained numbers, all numbers); a packed 4-bit byte counts as two."""
        trained = total = 0
        for p in self.parameters():
            n = p.numel() or getattr(p, "ds_numel", 0)
            if type(p).__name__ == "Params4bit":
                n *= 2 * getattr(getattr(p, "quant_storage", None), "itemsize", 1)
            total += n
            trained += n if p.requires_grad else 0
        return trained, total

    def print_trainable_parameters(self):
        """Print how many numbers are trained, of how many."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self):
        """One TunerLayerStatus for each adapted layer."""
        from peft.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self):
        """A TunerModelStatus: the layers' states, summed up."""
        from peft.status import get_model_status

        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name="default"):
        return not self._is_prompt_learning and self.base_model.supports_lora_conversion(adapter_name)

    # -- computing -----------------------------------------------------------------------------------------------
    def forward(self, *args, adapter_names=None, **kwargs):
        """The base model's forward under the active adapters.

        adapter_names: one adapter name for each sample of the batch ("__base__": none), or one for all of them; holds
        for this call and this thread alone. Inference only.
        """
        if self._is_prompt_learning:
            return self._prompt_forward(*args, adapter_names=adapter_names, **kwargs)
        return self._governed(self.base_model, adapter_names, args, kwargs)

    def generate(self, *args, adapter_names=None, **kwargs):
        """The base model's generate under the active adapters, or under `adapter_names` as in forward."""
        if self._is_prompt_learning:
            return self._prompt_generate(*args, adapter_names=adapter_names, **kwargs)
        return self._governed(self.base_model.generate, adapter_names, args, kwargs, self.base_model.during_generate)

    def _governed(self, run, adapter_names, args, kwargs, during=lambda arguments: contextlib.nullcontext()):
        """run(*args, **kwargs) with the adapters that the call, or the composition, chooses for each sample.

        during: from the call's arguments, a further context for it.
        """
        state = self.base_model.state
        by_row = adapter_names is None and state.enabled and isinstance(state.block, ByRow)
        if by_row:
            size = batch_size(args, kwargs)
            names = state.block.assign(size)
            args, kwargs = state.block.prepare(args, kwargs, size)
        arguments = self.base_model.call_arguments(args, kwargs)
        if by_row:
            checkpointing = torch.is_grad_enabled() and is_checkpointing(self.get_base_model())
            context = state.during(Call(names, **arguments), replay=checkpointing)
        elif adapter_names is None and not arguments:
            state.forget_replay()
            return run(*args, **kwargs)
        else:
            context = self._choosing(adapter_names, arguments, args, kwargs)
        with context, during(arguments):
            return run(*args, **kwargs)

    def _choosing(self, adapter_names, arguments, args, kwargs):
        """A context in which this thread's forwards use `adapter_names` and the method's own call arguments.

        Raises AdapterError where names cannot be given.
        """
        checkpointing = torch.is_grad_enabled() and is_checkpointing(self.get_base_model())
        if adapter_names is None:
            return self.state.during(Call(None, **arguments), replay=checkpointing)
        if self.training:
            raise AdapterError("Cannot pass `adapter_names` when the model is in training mode; call model.eval().")
        if any(layer.merged for layer in self.base_model.layers.values()):
            raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please unmerge first.")
        size = batch_size(args, kwargs)
        names = [adapter_names] * (size or 1) if isinstance(adapter_names, str) else list(adapter_names)
        if size is not None and size != len(names):
            raise AdapterError(f"adapter_names needs one name a sample: got {len(names)} names for {size} samples.")
        if unknown := sorted(set(names) - {Call.BASE} - set(self.peft_config)):
            raise AdapterError(
                f"adapter_names asks for unknown adapters: {', '.join(unknown)}; there are {list(self.peft_config)}."
            )
        return self.state.during(Call(names, **arguments), replay=checkpointing)

    @contextlib.contextmanager
    def disable_adapter(self):
        """While inside, the model computes what the base model would. Leaves everything exactly as it was."""
        state, before = self.state, self.state.enabled
        strays = [(holder, holder.state.enabled) for holder in state.strays]
        try:
            if self._is_prompt_learning:
                state.enabled = False
            else:
                self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            state.enabled = before
            for holder, enabled in strays:
                holder.state.enabled = enabled
            self._adapters_disabled = not before

    def prepare_model_for_gradient_checkpointing(self, model):
        """Let gradients flow through a frozen embedding, as re-entrant checkpointing needs; returns the model."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        return model

    # -- switching -----------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name, inference_mode=False):
        """Let this adapter act, and no other. It is trained from now on unless it was made or loaded for inference.

        adapter_name: a name, or a composition of names: Stack, Average, Split, Parallel. Raises ValueError for an
        unknown name.
        """
        names = adapter_name.names if isinstance(adapter_name, Composition) else [adapter_name]
        if unknown := [n for n in names if n not in self.peft_config]:
            raise AdapterError(f"Adapter {', '.join(map(str, unknown))} not found. There are {list(self.peft_config)}.")
        if self._is_prompt_learning:
            if len(names) > 1:
                raise AdapterError(f"One prompt acts at a time, but {adapter_name!r} names {len(names)}.")
            self.prompt_state.active = tuple(names)
            self._mark_prompt_trainable(inference_mode)
        else:
            self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Train adapters, or freeze them, whether they are active or not. Raises TypeError for prompt methods."""
        if self._is_prompt_learning:
            raise TypeError("Setting requires_grad is not supported for prompt learning methods; use set_adapter.")
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True):
        """Add an adapter with fresh weights, neither active nor trained yet. A failure leaves nothing behind.

        Raises ValueError for a name that is taken or a method other than the model's.
        """
        prefix = registry.method(peft_config.peft_type).prefix
        if prefix and adapter_name == prefix.rstrip("_"):
            warnings.warn(
                f"Adapter name {adapter_name!r} is part of the names of the method's own parameters; other programs "
                "that search those names may confuse them.",
                PeftWarning,
                stacklevel=2,
            )
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"This model holds {self.peft_type} adapters, and cannot take one of {peft_config.peft_type}. "
                "PeftMixedModel holds several."
            )
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.")
        check_name(adapter_name)
        self._add_task_modules(peft_config)
        self._fill_base_name(peft_config, self.get_base_model())
        if self._is_prompt_learning:
            self._add_prompt(adapter_name, peft_config)
            return
        self.base_model.inject_adapter(
            self.base_model.model,
            adapter_name,
            peft_config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def delete_adapter(self, adapter_name):
        """Remove an adapter; if it was active, the first one left becomes active. Raises ValueError if unknown."""
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist; there are {list(self.peft_config)}.")
        if not self._is_prompt_learning:
            self.base_model.delete_adapter(adapter_name)
            return
        self._delete_prompt(adapter_name)

    @classmethod
    def _add_task_modules(cls, config):
        """Heads that the task trains go into config.modules_to_save, where the method has it."""
        if cls.task_modules and any(f.name == "modules_to_save" for f in dataclasses.fields(config)):
            given = list(config.modules_to_save or ())
            config.modules_to_save = given + [m for m in cls.task_modules if m not in given]

    @staticmethod
    def _fill_base_name(config, model):
        if config.base_model_name_or_path is None:
            base_config = getattr(model, "config", None)
            name = model.__dict__.get("name_or_path") or getattr(base_config, "_name_or_path", None)
            name = name or getattr(base_config, "name_or_path", None)
            config.base_model_name_or_path = name or None

    # -- prompt methods (peft.prompts) -----------------------------------------------------------------------------
    def _add_prompt(self, name, config):
        from peft.prompts import prompt_model

        prompt_model.add(self, name, config)

    def _delete_prompt(self, name):
        from peft.prompts import prompt_model

        prompt_model.delete(self, name)

    def _mark_prompt_trainable(self, inference_mode):
        from peft.prompts import prompt_model

        prompt_model.mark_trainable(self, inference_mode)

    def _prompt_forward(self, *args, **kwargs):
        from peft.prompts import prompt_model

        return prompt_model.forward(self, *args, **kwargs)

    def _prompt_generate(self, *args, **kwargs):
        from peft.prompts import prompt_model

        return prompt_model.generate(self, *args, **kwargs)

    def get_prompt(self, batch_size, task_ids=None, max_cache_len=None):
        """The active prompt for a batch: embeddings, or a cache that begins with it. The cache grows as needed."""
        from peft.prompts import prompt_model

        return prompt_model.get_prompt(self, batch_size, task_ids)

    @property
    def prompt_tokens(self):
        """{adapter name: the numbers of its virtual tokens}."""
        from peft.prompts import prompt_model

        return prompt_model.prompt_tokens(self)

    @property
    def word_embeddings(self):
        return self.get_base_model().get_input_embeddings()

    @property
    def transformer_backbone_name(self):
        """Name of the child that holds the base model's layers."""
        children = self.get_base_model().named_children()
        return next((name for name, child in children if hasattr(child, "base_model_prefix")), None)

    def get_prompt_embedding_to_save(self, adapter_name):
        """The virtual tokens as a file holds them."""
        return self.prompt_tables(adapter_name)["prompt_embeddings"]

    def prompt_tables(self, adapter_name):
        """All tensors that a file holds of a prompt."""
        from peft.prompts import prompt_model

        return prompt_model.tables_to_save(self, adapter_name)

    def load_prompt(self, adapter_name, tables, ignore_mismatched_sizes=False):
        """Put the tensors of a file into a prompt."""
        from peft.prompts import prompt_model

        prompt_model.load(self, adapter_name, tables, ignore_mismatched_sizes)

    # -- files ---------------------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory, **options):
        """Write adapters into a folder; see `peft.saving.save_pretrained` for the options."""
        from peft.saving import save_pretrained

        return save_pretrained(self, save_directory, **options)

    def create_or_update_model_card(self, output_dir):
        """Write README.md with the metadata that the hub reads; text that is there already stays."""
        from peft.card import write_model_card

        write_model_card(self, output_dir)
