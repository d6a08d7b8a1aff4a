"""A model with LoRA adapters: what concerns all its layers at once."""

import warnings

from peft.core import match
from peft.core.defaults import LORA_TARGETS
from peft.core.tuner import Tuner
from peft.errors import ConfigError
from peft.methods.lora import inits
from peft.methods.lora.config import LoraConfig
from peft.methods.lora.lora import LoraLayer
from peft.registry import register


class LoraModel(Tuner):
    """A model with LoRA adapters."""

    layer_cls = LoraLayer
    target_module_mapping = LORA_TARGETS
    unsafe_targets = match.STATE_SPACE_UNSAFE
    invocable = False  # True: there is, or was, an aLoRA adapter

    def call_arguments(self, args, kwargs):
        if not self.invocable:
            kwargs.pop("alora_offsets", None)
            return {}
        from peft.methods.lora.alora import Invocations

        return {"invocations": Invocations(args, kwargs)}

    def prepare_model(self, config):
        if config.layer_replication:
            from peft.methods.lora.replicate import replicate_layers

            replicate_layers(self.model, config.layer_replication)

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        self.invocable = self.invocable or bool(config.alora_invocation_tokens)
        others = [c for n, c in self.peft_config.items() if n != adapter_name and isinstance(c, LoraConfig)]
        if others and bool(others[0].kasa_config) != bool(config.kasa_config):
            raise ConfigError(
                "KaSA adapters, which act on a part of the base weight, and others cannot be on one model: "
                f"{adapter_name!r} {'is KaSA' if config.kasa_config else 'is not KaSA'}, unlike those already there."
            )
        if (
            others
            and config.target_parameters
            and sorted(others[0].target_parameters or ()) != sorted(config.target_parameters)
        ):
            raise ConfigError(
                "All adapters of a model must have the same target_parameters: "
                f"{sorted(others[0].target_parameters or ())} is there, {sorted(config.target_parameters)} is new."
            )

    def _add_to_targets(self, name, config, state_dict, how):
        super()._add_to_targets(name, config, state_dict, how)
        if not config.rank_pattern and not config.alpha_pattern:
            return
        self._collect()
        keys = [layer.adapters[name].key for layer in self.layers.values() if name in layer.adapters]
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern, _ in getattr(config, field).items():
                if not any(match.pattern_value({pattern: True}, key, False) for key in keys):
                    warnings.warn(
                        f"{field} has the entry {pattern!r}, which matches none of the adapted layers.",
                        RuntimeWarning,
                        stacklevel=5,
                    )

    def _get_monteclora_loss(self, adapter_names=None):
        """What MonteCLoRA adds to the loss in training, a mean over layers. adapter_names: default the active ones."""
        losses = [a.penalty() for a in self._adapters_of("monteclora_config", adapter_names) if a.training]
        return sum(losses) / len(losses) if losses else 0.0

    def _get_kasa_loss(self, adapter_names=None):
        """What KaSA adds to the loss, a sum over layers. adapter_names: default the active ones."""
        return sum((a.penalty() for a in self._adapters_of("kasa_config", adapter_names)), 0.0)

    def _adapters_of(self, variant, names):
        names = self.state.active if names is None else [names] if isinstance(names, str) else names
        chosen = [n for n in names if n in self.peft_config and getattr(self.peft_config[n], variant, None)]
        return [layer.adapters[n] for layer in self.layers.values() for n in chosen if n in layer.adapters]

    def file_form(self, name, tensors, config, plain=False):
        """(tensors, config) as a file holds them: starts from data, or with plain=True any, become further rank."""
        from peft.methods.lora.plain import plain_form

        started = any(a.lora_start_A is not None for a in self.adapters_called(name))
        if plain and not started:
            raise ConfigError(
                f"Adapter {name!r} starts with init_lora_weights={config.init_lora_weights!r}, which takes nothing "
                "from the base: there is nothing to convert. Leave path_initial_model_for_weight_conversion out."
            )
        if not started or not (plain or config.init_lora_weights in inits.FROM_DATA):
            return tensors, config
        return plain_form(tensors, config, self.adapters_called(name))

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", *args, **options):
        """Combine adapters into a new one; see `peft.methods.lora.combine.add_weighted_adapter`."""
        from peft.methods.lora.combine import add_weighted_adapter

        return add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, *args, **options)


register("LORA", LoraConfig, tuner=LoraModel, prefix="lora_", mixed=True)
