"""AdapterFusion: what several adapters make of a layer's output, mixed by a trained attention (arXiv 2005.00247)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import PeftConfig
from peft.core.adapter import Adapter, Param
from peft.core.compose import Site, chain
from peft.core.hidden_states import HiddenStatesLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.layers.block import output_width
from peft.registry import register


@dataclass
class FusionConfig(PeftConfig):
    """Attention over adapters that a PeftStackedModel has already. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.FUSION

    adapters: list[str] | None = field(default=None, metadata={"help": "names of the adapters to mix"})
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of a block's output; None: as the model's config says"}
    )

    # What making adapters reads of every config, and this method does not have.
    modules_to_save: ClassVar = None
    target_modules: ClassVar = None

    def __post_init__(self):
        super().__post_init__()
        if not self.adapters or isinstance(self.adapters, str) or len(set(self.adapters)) < len(self.adapters):
            raise ConfigError(
                f"FusionConfig.adapters must be a list of different adapter names, got {self.adapters!r}."
            )
        if self.hidden_size is not None:
            check_range(self, "hidden_size", 1)


class Fusion(Adapter):
    """y + Σ aᵢ (zᵢ - y) V, where zᵢ is what adapter i alone makes of y, and a = softmax over i of (y Q)·(zᵢ K) / √d."""

    prefix = "fusion_"
    kinds = ("linear", "sublayer")
    parallel = False
    folds = False

    fusion_query, fusion_key, fusion_value = Param(), Param(), Param()  # (d, d)

    def build(self, c, where):
        d = output_width(self.layer, c.hidden_size)
        for name in ("fusion_query", "fusion_key", "fusion_value"):
            setattr(self, name, nn.Parameter(torch.empty(d, d, **where)))

    def reset(self, c):
        self.fusion_query.normal_(0, 0.02)
        self.fusion_key.normal_(0, 0.02)
        nn.init.eye_(self.fusion_value)  # near the mean of the adapters

    def output(self, x, y):
        adapters = chain(self.layer)
        members = [n for n in self.config.adapters if n in adapters]
        site = Site(adapters, self.base, y)
        z = torch.stack([site.act(name, x, y) for name in members]).to(y.dtype)  # (adapters, ..., d)
        Q, K, V = (p.to(y.dtype) for p in (self.fusion_query, self.fusion_key, self.fusion_value))
        scores = ((y @ Q) * (z @ K)).sum(-1, keepdim=True, dtype=torch.float32) * y.shape[-1] ** -0.5
        mixed = (scores.softmax(0).to(y.dtype) * (z - y)).sum(0)
        return y + mixed @ V


class FusionLayer(HiddenStatesLayer):
    """An adapted layer whose adapters are mixed."""

    adapter_cls = Fusion


class FusionModel(Tuner):
    """A model in which adapters are mixed wherever they are."""

    layer_cls = FusionLayer

    def prepare_config(self, config):
        if config.hidden_size is None:
            config.hidden_size = getattr(getattr(self.model, "config", None), "hidden_size", None)
        if unknown := [n for n in config.adapters if n not in self.peft_config]:
            known = [n for n, c in self.peft_config.items() if c is not config]
            raise ConfigError(
                f"FusionConfig.adapters names {unknown}, which the model does not have; it has {known}. Add the fusion "
                "to a PeftStackedModel after the adapters that it mixes."
            )

    def _add_to_targets(self, name, config, state_dict, how):
        """On every layer that has one of the adapters, around all that is there."""
        wanted = set(config.adapters)
        found = {
            path.replace(".base_layer", ""): next(a.key for n, a in layer.adapters.items() if n in wanted)
            for path, layer in self.layers.items()
            if wanted & set(layer.adapters)
        }
        for path, layer in self.layers.items():
            if wanted & set(layer.adapters) and not layer.kind.composes:
                raise ConfigError(
                    f"{path} is adapted as a layer of the kind {layer.kind.name}, where adapters do not act on an "
                    "output, so they cannot be fused. Leave it out of the adapters' targets."
                )
        for path, key in found.items():
            self._layer_at(path, self.model.get_submodule(path)).add_adapter(name, config, key, **how)


register("FUSION", FusionConfig, tuner=FusionModel, prefix="fusion_")
