"""A layer with experts, and the one adapter on it that acts."""

import torch

from peft.core.adapter import Adapter
from peft.errors import AdapterError, ConfigError
from peft.methods.lora.lora import Lora, LoraLayer
from peft.ops import lowrank
from peft.ops.lowrank import LowRank


class Expert(Lora):
    """A LoRA that does nothing by itself: the layer's `Mixture` asks it for its factors."""

    kinds = ("linear", "embedding")

    @classmethod
    def of(cls, c, key):
        unfit = ["modules_to_save", "trainable_token_indices", "layer_replication"]
        unfit = [n for n in unfit if getattr(c, n)] + (["bias"] if c.bias != "none" else [])
        if unfit or c.variant:
            raise ConfigError(
                f"A LoRA with {unfit[0] if unfit else c.variant.title} cannot be an expert of X-LoRA: more than two "
                "factors a layer would have to be mixed."
            )
        return cls


class Mixture(Adapter):
    """y + Σᵢ gᵢ·sᵢ·Bᵢ(Aᵢ x) over the experts of a layer. Holds no tensors, and is the only adapter that acts.

    index: the layer's number among those that have experts.
    """

    def __init__(self, layer, name, key, index, experts):
        super().__init__(layer, name, key)
        self.index, self.experts = index, experts

    def output(self, x, y):
        g = self._gates(y)
        if g is None:
            return y
        mine = [(i, self.layer.adapters[n]) for i, n in enumerate(self.experts) if n in self.layer.adapters]
        pairs = [a.low_rank() for _, a in mine] if self.kind.name == "linear" else [None]
        if all(f is not None and f.row_scale is None and f.bias is None and not f.dropout for f in pairs):
            joined = LowRank(torch.cat([f.A for f in pairs]), torch.cat([f.B * f.s for f in pairs], dim=1), 1.0)
            columns = [g[..., i : i + 1].expand(*g.shape[:-1], len(f.A)) for (i, _), f in zip(mine, pairs)]
            return y + lowrank.update(x, joined, torch.cat(columns, dim=-1)).to(y.dtype)
        return y + sum(g[..., i : i + 1].to(y.dtype) * (a.output(x, y) - y) for i, a in mine)

    def _gates(self, y):
        """(..., experts) that multiply the updates of y (..., out); None: the base model is asked for."""
        call = self.layer.state.call()
        if call is None or "gates" not in call.arguments:
            raise AdapterError(
                f"{self.key} was not called through its PeftModel, so X-LoRA has not weighed its experts. Call that, "
                "not the base model or a layer of it."
            )
        if (g := call.arguments["gates"]) is None:
            return None
        g = g[:, :, self.index]
        if y.shape[:-1] == g.shape[:-1] or g.shape[:2] == (1, 1):
            return g
        if y.ndim == 2 and len(y) == g.shape[0] * g.shape[1]:
            return g.flatten(0, 1)
        raise AdapterError(
            f"X-LoRA weighs experts for each token, but {self.key} returned {tuple(y.shape)} for {g.shape[0]} "
            f"sequences of {g.shape[1]} tokens. Use experts that do not adapt it."
        )


class XLoraLayer(LoraLayer):
    """A base layer with experts."""

    adapter_cls = Expert
    mixture = None

    def live(self):
        return [self.mixture] if self.mixture is not None and self.mixture.name in self.state.active else []

    def supports_lora_conversion(self, adapter_name="default"):
        return False
