"""X-LoRA at model level: each call is two, the first for the hidden states that the classifier reads."""

import functools
import inspect

import torch

from peft.core import checkpoint
from peft.core.adapter import module_slots
from peft.core.around import around_forwards
from peft.core.calls import is_checkpointing
from peft.core.defaults import LORA_TARGETS
from peft.core.match import STATE_SPACE_UNSAFE
from peft.core.state import Call
from peft.core.tuner import Tuner, check_name
from peft.enums import PeftType
from peft.errors import AdapterError, ConfigError
from peft.methods.xlora.classifier import ScalingsLog, XLoraClassifier, gates
from peft.methods.xlora.config import XLoraConfig
from peft.methods.xlora.layer import Mixture, XLoraLayer


class XLoraModel(Tuner):
    """A model whose layers have LoRA experts, and the network that mixes them. There is one mixture a model.

    Experts have the names that the config gives them, also in `peft_config`; only the mixture can be active.
    """

    layer_cls = XLoraLayer
    target_module_mapping = LORA_TARGETS
    unsafe_targets = STATE_SPACE_UNSAFE
    injectable = False

    @property
    def xlora_config(self):
        return next((c for c in self.peft_config.values() if isinstance(c, XLoraConfig)), None)

    # -- making --------------------------------------------------------------------------------------------------
    def inject_adapter(self, model, adapter_name, config=None, *, autocast_adapter_dtype=True, **how):
        """Load the experts, and make a network to mix them. Nothing stays behind if that fails."""
        config = self.peft_config[adapter_name] if config is None else config
        check_name(adapter_name)
        self._check(adapter_name, config)
        before = dict(self.peft_config)
        self.peft_config[adapter_name] = config
        try:
            for name in config.experts:
                lora, tensors = config.expert_tensors(name)
                if lora.peft_type != PeftType.LORA:
                    raise ConfigError(f"Expert {name!r} is a {lora.peft_type} adapter; X-LoRA mixes LORA adapters.")
                lora.inference_mode = config.inference_mode or not config.use_trainable_adapters
                super().inject_adapter(
                    model, name, lora, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=True
                )
                self._fill(name, tensors)
        except BaseException:
            for name in [n for n in self.peft_config if n not in before]:
                self._remove(name)
            self.peft_config.clear()
            self.peft_config.update(before)
            raise
        for i, layer in enumerate(self.layers.values()):
            layer.mixture = Mixture(layer, adapter_name, next(iter(layer.adapters.values())).key, i, config.experts)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        where = {"device": like.device, "dtype": like.dtype}
        self.internal_xlora_classifier = XLoraClassifier(config, len(self.layers), len(config.adapters), **where)
        self.internal_xlora_classifier.requires_grad_(False).train(model.training)
        self.log = ScalingsLog()
        known = inspect.signature(model.forward).parameters
        self.first_pass = {"output_hidden_states": True, "return_dict": True}
        self.first_pass |= {"logits_to_keep": 1} if "logits_to_keep" in known else {}  # nobody reads them

    def _check(self, adapter_name, config):
        if any(isinstance(c, XLoraConfig) for n, c in self.peft_config.items() if n != adapter_name):
            raise ConfigError("A model can have one X-LoRA adapter; delete the one there is first.")
        base = getattr(self.model, "config", None)
        if getattr(base, "use_cache", False):
            raise ConfigError(
                "X-LoRA weighs the experts of all tokens anew in each call, so nothing can be cached: set "
                "model.config.use_cache = False."
            )
        width = getattr(base, "hidden_size", config.hidden_size)
        if width != config.hidden_size:
            raise ConfigError(f"XLoraConfig.hidden_size is {config.hidden_size}, but the model's is {width}.")
        if not config.adapters:
            raise ConfigError("XLoraConfig.adapters names no experts; give {name: folder or hub id of a LoRA adapter}.")
        if (config.top_k_lora or 0) > len(config.adapters):
            raise ConfigError(f"top_k_lora={config.top_k_lora} is more than the {len(config.adapters)} experts.")
        if adapter_name in config.adapters:
            raise ConfigError(f"XLoraConfig.adapters has an expert called {adapter_name!r}, as the mixture itself is.")

    def _fill(self, name, tensors):
        """Put the tensors of a LoRA file into an expert."""
        tensors = {k.removeprefix("base_model."): v for k, v in tensors.items()}
        result = checkpoint.set_peft_model_state_dict(self, tensors, name)
        checkpoint.warn_about(result, name)
        for layer in self.layers.values():
            if name in layer.adapters:
                layer.adapters[name].settle()

    def own_slots(self, adapter_name):
        """The mixture's file holds the network; each expert has a file of its own, a plain LoRA adapter."""
        if not isinstance(self.peft_config[adapter_name], XLoraConfig):
            return []
        found = module_slots(self.internal_xlora_classifier, "internal_xlora_classifier.")
        for slot in found:
            slot.file_key = slot.key
        return found

    # -- switching -----------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name, inference_mode=False):
        """Let the mixture act (or nothing). Its network is trained then, and the experts if the config says so."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        config = self.xlora_config
        if experts := [n for n in names if config is not None and n in config.adapters]:
            raise AdapterError(f"{experts[0]!r} is an expert of X-LoRA, which cannot act alone. Activate the mixture.")
        super().set_adapter(names, inference_mode)
        if config is None:
            return
        trained = self.peft_config.get(next(iter(names), None)) is config and not inference_mode
        self.internal_xlora_classifier.requires_grad_(trained and not config.inference_mode)
        for layer in self.layers.values():
            for adapter in layer.adapters.values():
                adapter.set_trainable(trained and not adapter.frozen)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if isinstance(self.peft_config.get(name), XLoraConfig):
                self.internal_xlora_classifier.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name):
        """Remove the mixture with all its experts."""
        config = self.xlora_config
        if config is not None and adapter_name in config.adapters:
            raise AdapterError(f"{adapter_name!r} is an expert of X-LoRA, whose network is made for all of them.")
        if config is None or self.peft_config.get(adapter_name) is not config:
            super().delete_adapter(adapter_name)
            return
        for name in (*config.experts, adapter_name):
            super().delete_adapter(name)
        del self.internal_xlora_classifier

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        """Raises NotImplementedError."""
        raise NotImplementedError("X-LoRA cannot be merged: what it does to a weight differs from token to token.")

    # -- computing -----------------------------------------------------------------------------------------------
    def forward(self, *args, **kwargs):
        if not self._acts():
            return self.model(*args, **kwargs)
        call = Call()
        with self.state.during(call, replay=torch.is_grad_enabled() and is_checkpointing(self.model)):
            self._weigh(call, args, kwargs)
            return self.model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """The base model's generate; the experts are weighed anew in each step."""
        if not self._acts():
            return self.model.generate(*args, **kwargs)
        call = Call()
        weigh = functools.partial(self._weigh, call)
        with self.state.during(call), around_forwards(self.model, weigh):
            return self.model.generate(*args, **{**kwargs, "use_cache": False})

    def _acts(self):
        """Whether the mixture acts in a call that begins now."""
        call = self.state.call()
        if call is not None and call.names is not None:
            raise AdapterError("adapter_names cannot choose adapters here: X-LoRA weighs its experts itself.")
        return self.state.enabled and any(isinstance(self.peft_config[n], XLoraConfig) for n in self.state.active)

    def _weigh(self, call, args, kwargs):
        """The first pass, and the gates that follow from it."""
        if kwargs.get("use_cache") or any(kwargs.get(n) is not None for n in ("past_key_values", "cache")):
            raise AdapterError("X-LoRA weighs the experts of all tokens anew: it needs use_cache=False and no cache.")
        config, value = self.xlora_config, self.xlora_config.scaling_pass_value
        kwargs = {k: v for k, v in kwargs.items() if k != "labels"}
        with torch.no_grad():
            even = torch.full((1, 1, len(self.layers), len(config.adapters)), float(value))
            call.arguments["gates"] = gates(config, even) if value else None
            out = self.model.forward(*args, **{**kwargs, **self.first_pass})
        hidden = getattr(out, "hidden_states", None)
        if hidden is None:
            raise AdapterError(f"{type(self.model).__name__} returns no hidden_states, which X-LoRA needs.")
        scalings = self.internal_xlora_classifier(hidden[-1])
        self.log.add(scalings)
        call.arguments["gates"] = gates(config, scalings)

    # -- settings ------------------------------------------------------------------------------------------------
    def set_topk_lora(self, value):
        """Use only the `value` experts with the largest scalings for each token; None: all. Changes the config."""
        if value is not None and not 1 <= value <= len(self.xlora_config.adapters):
            raise ConfigError(f"top_k_lora must be from 1 to {len(self.xlora_config.adapters)} or None, got {value!r}.")
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight):
        """Multiply all scalings by `weight`. Changes the config."""
        self.xlora_config.global_scaling_weight = float(weight)

    def get_global_scaling_weight(self):
        """What all scalings are multiplied by."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value):
        """Give all experts this scaling in the first pass; None: equal shares. Changes the config."""
        value = 1 / len(self.xlora_config.adapters) if value is None else float(value)
        self.xlora_config.scaling_pass_value = value

    def set_use_trainable_adapters(self, use_trainable_adapters):
        """Train the experts, too, or not. Changes the config."""
        self.xlora_config.use_trainable_adapters = use_trainable_adapters
        super().set_requires_grad(list(self.xlora_config.adapters), use_trainable_adapters)

    # -- what the network said -----------------------------------------------------------------------------------
    def get_latest_scalings(self):
        """(batch, tokens, layers, experts) of the latest call, or None. They carry its gradients."""
        return self.log.latest

    def get_scalings_log(self):
        """The scalings of each call since logging was enabled."""
        return self.log.all

    def enable_scalings_logging(self):
        """Keep the scalings of all calls from now on."""
        self.log.on = True

    def disable_scalings_logging(self):
        """Keep no more scalings; those logged so far stay."""
        self.log.on = False

    def clear_scalings_log(self):
        """Forget the logged scalings."""
        self.log.all.clear()

    def get_bucketed_scalings_log(self):
        """{number of tokens: ([positions in the log], [scalings])}, so that scalings of equal shape are together."""
        return self.log.by_length()
