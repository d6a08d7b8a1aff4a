"""(IA)³, l∘(Wx + b), or W(l∘x) + b on feed-forward layers: one trained factor per activation (arXiv 2205.05638)."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core import match
from peft.core.adapter import Adapter, Param, Val
from peft.core.declare import layer_class
from peft.core.defaults import IA3_FEEDFORWARD, IA3_TARGETS
from peft.core.tuner import Tuner
from peft.enums import PeftType
from peft.errors import AdapterError, ConfigError
from peft.methods import combining
from peft.registry import register


@dataclass
class IA3Config(ModulesConfig):
    """(IA)³ on linear and convolutional layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.IA3

    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, name endings or one regex of modules that stay as they are"}
    )
    feedforward_modules: list[str] | str | None = field(
        default=None, metadata={"help": "those of the targets whose input is scaled instead of their output"}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    init_ia3_weights: bool = field(default=True, metadata={"help": "start as the base model (ones), else at random"})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        sets = isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set)
        if sets and (others := self.feedforward_modules - self.target_modules):
            raise ConfigError(
                f"IA3Config.feedforward_modules should be a subset of target_modules, but has also {sorted(others)}. "
                "Spell its entries as target_modules does."
            )


class IA3(Adapter):
    """Scales the layer's output, or, on feed-forward layers, its input."""

    prefix = "ia3_"
    kinds = ("linear", "conv")
    parallel = False

    ia3_l = Param()  # (out, 1) or (1, in); convolutions: (1, out or in, 1, ...)
    is_feedforward = Val()

    def build(self, c, where):
        self.correct_layout(c)
        listed = c.feedforward_modules
        if isinstance(listed, str):
            self.is_feedforward = bool(match.Names(listed).match(self.key))
        else:
            self.is_feedforward = self.key.endswith(tuple(listed))  # upstream's rule: an ending, not only at a dot
        out, inp, *kernel = self.layer.shape
        size = inp * getattr(self.base, "groups", 1) if self.is_feedforward else out
        shape = (1, size) if self.is_feedforward else (size, 1)
        if kernel:
            shape = (1, size, *[1] * len(kernel))
        self.ia3_l = nn.Parameter(torch.empty(shape, **where))

    def reset(self, c):
        if c.init_ia3_weights:
            self.ia3_l.fill_(1)
        else:
            self.ia3_l.normal_()

    def input(self, x):
        return x * self.kind.per_in(self.ia3_l) if self.is_feedforward else x

    def output(self, x, y):
        return y if self.is_feedforward else y * self.kind.per_out(self.ia3_l)

    def merged_weight(self, W):
        factors = self.ia3_l.flatten().to(W.dtype)
        if self.is_feedforward:  # each group of a convolution reads channels of its own
            factors = factors.view(-1, 1, W.shape[1]).expand(-1, W.shape[0] * W.shape[1] // len(factors), -1)
            return W * factors.reshape(*W.shape[:2], *[1] * (W.ndim - 2))
        return W * factors.view(-1, *[1] * (W.ndim - 1))

    def merged_bias(self, b, W):
        return b if b is None or self.is_feedforward else (b * self.ia3_l.flatten()).to(b.dtype)


IA3Layer = layer_class("IA3Layer", IA3)


class IA3Model(Tuner):
    """A model with (IA)³ adapters."""

    layer_cls = IA3Layer
    target_module_mapping = IA3_TARGETS
    condenses = False  # feedforward_modules must go on naming some of the targets

    def prepare_config(self, config):
        super().prepare_config(config)
        if config.feedforward_modules is not None:
            return
        model_type = getattr(getattr(self.model, "config", None), "model_type", "custom")
        if model_type not in IA3_FEEDFORWARD:
            raise ConfigError(
                f"Please specify `feedforward_modules` in `peft_config`: there is no default for models of the type "
                f"{model_type!r}. [] scales the output of all target modules."
            )
        names, targets = IA3_FEEDFORWARD[model_type], config.target_modules
        # Upstream keeps names that are no targets, and then cannot read its own config.
        listed = names if isinstance(targets, str) else [t for t in targets if match.Names(names).match(t)]
        config.feedforward_modules = set(listed)

    @torch.no_grad()
    def add_weighted_adapter(self, adapters, weights, adapter_name):
        """Make the adapter `adapter_name`, inactive, whose factors are the weighted sums of others'.

        Where one of them does not adapt a layer it counts with factors of one, which is what it does there (upstream
        leaves it out of the sum). Nothing happens if the name exists. Raises ValueError (AdapterError) for adapters
        that cannot be combined; the model is then as before.
        """
        if adapter_name in self.peft_config:
            return
        combining.check_request(self, adapters, weights)
        self.inject_adapter(self.model, adapter_name, self._combined_config(adapters))
        try:
            for layer in self.layers.values():
                if new := layer.adapters.get(adapter_name):
                    _fill(new, [layer.adapters.get(a) for a in adapters], weights)
            combining.copy_extras(self, adapters, adapter_name)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def _combined_config(self, adapters):
        """The first adapter's config, for exactly the layers of all of them."""
        configs = [self.peft_config[a] for a in adapters]
        changes = {f: [getattr(c, f) for c in configs] for f in ("target_modules", "feedforward_modules")}
        if len({isinstance(spec, str) for spec in changes["feedforward_modules"]}) > 1:
            raise AdapterError("Adapters whose feedforward_modules are a list and a regex cannot be combined.")
        changes = {f: combining.union(specs) for f, specs in changes.items()}
        if any(c.exclude_modules != configs[0].exclude_modules for c in configs):
            parts = [layer.adapters[a] for layer in self.layers.values() for a in adapters if a in layer.adapters]
            changes["target_modules"] = {p.key for p in parts}
            changes["feedforward_modules"] = {p.key for p in parts if p.is_feedforward}
            changes["exclude_modules"] = None
        whole = list(dict.fromkeys(m for c in configs for m in c.modules_to_save or ()))
        return dataclasses.replace(configs[0], **changes, modules_to_save=whole or None)


def _fill(new, parts, weights):
    """Write the weighted sum of `parts` (None: an adapter that leaves this layer as it is) into a new adapter."""
    if any(p is not None and p.is_feedforward != new.is_feedforward for p in parts):
        raise AdapterError(
            f"These adapters cannot be combined: on {new.key} some scale the input and others the output. Load them "
            "with the same feedforward_modules."
        )
    new.ia3_l.zero_()
    for part, weight in zip(parts, weights):
        new.ia3_l.add_(torch.ones_like(new.ia3_l) if part is None else part.ia3_l, alpha=weight)


register("IA3", IA3Config, tuner=IA3Model, prefix="ia3_", mixed=True)
