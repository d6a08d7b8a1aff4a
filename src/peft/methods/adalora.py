"""AdaLoRA, W + s·B·diag(E)·A: a budget of ranks, moved in training to the layers that need them (arXiv 2303.10512)."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.core.adapter import Additive, Mod, Param, Val, dropout_rate, through
from peft.core.checkpoint import PREFIX
from peft.core.declare import layer_class
from peft.core.defaults import ADALORA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import AdapterError, ConfigError, PeftWarning
from peft.methods.adalora_budget import RankAllocator
from peft.methods.lora.config import MAX_RANK, STARTS, VARIANTS, LoraConfig
from peft.methods.lora.model import LoraModel
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA on linear layers and convolutions. Wrong values raise ConfigError, naming the field.

    Until step `tinit` all ranks stay, until `total_step - tfinal` they shrink, then training goes on with what is left.
    """

    METHOD: ClassVar = PeftType.ADALORA
    # Settings of LoRA that say nothing here: files may have them, whoever sets them is told.
    UNUSED: ClassVar = {"r": 8, "use_rslora": False, "alpha_pattern": {}, "lora_bias": False}

    rank_pattern: dict | None = field(
        default=None, metadata={"help": "which triplets each layer keeps; written by training, do not set it"}
    )
    target_r: int = field(default=8, metadata={"help": "average rank of a layer at the end"})
    init_r: int = field(default=12, metadata={"help": "rank of every layer at the start"})
    tinit: int = field(default=0, metadata={"help": "first steps, in which no rank is taken away"})
    tfinal: int = field(default=0, metadata={"help": "last steps, in which the ranks that are left do not change"})
    deltaT: int = field(default=1, metadata={"help": "steps from one choice of ranks to the next"})
    beta1: float = field(default=0.85, metadata={"help": "how slowly a parameter's sensitivity forgets"})
    beta2: float = field(default=0.85, metadata={"help": "how slowly the uncertainty of the sensitivity forgets"})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "weight of the loss that keeps rows of A and columns of B orthogonal"}
    )
    total_step: int | None = field(default=None, metadata={"help": "steps of the whole training; required"})

    def __post_init__(self):
        pattern, self.rank_pattern = self.rank_pattern, None  # LoRA's field of this name holds numbers
        super().__post_init__()
        self.rank_pattern = pattern
        for key, keep in (pattern or {}).items():
            if not isinstance(keep, (list, tuple)) or not all(isinstance(k, bool) for k in keep):
                raise ConfigError(f"AdaLoraConfig.rank_pattern[{key!r}] must be a list of bool, got {keep!r}.")
        for name in ("use_dora", "loftq_config", "target_parameters", *VARIANTS, *STARTS):
            if getattr(self, name):
                raise ConfigError(f"AdaLoRA does not support {name}; leave AdaLoraConfig.{name} at its default.")
        if self.total_step is None:
            raise ConfigError("AdaLoraConfig.total_step must be the number of training steps, got None.")
        check_range(self, "init_r", 0, MAX_RANK)
        for name, low in (("target_r", 0), ("tinit", 0), ("tfinal", 0), ("deltaT", 1), ("total_step", 1)):
            check_range(self, name, low)
        for name in ("beta1", "beta2"):
            check_range(self, name, 0, 1)
        check_range(self, "orth_reg_weight", 0)
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"total_step={self.total_step} leaves no steps in which ranks shrink: it must be greater than "
                f"tinit + tfinal = {self.tinit + self.tfinal}."
            )
        if unused := [name for name, default in self.UNUSED.items() if getattr(self, name) != default]:
            warnings.warn(
                f"AdaLoRA does not use {', '.join(unused)}; the rank is set by init_r and target_r, the scaling by "
                "lora_alpha.",
                PeftWarning,
                stacklevel=3,
            )


class AdaLora(Additive):
    """y + s·B(E∘(A x)), with s = lora_alpha / init_r also after ranks were taken away."""

    prefix = "lora_"
    kinds = ("linear", "conv")

    lora_dropout = Mod(trainable=False)
    lora_A, lora_B, lora_E = Param(), Param(), Param()  # (r, in · kernel), (out, r), (r, 1)
    r, lora_alpha, scaling, ranknum = Val(), Val(), Val(), Val()

    def build(self, c, where):
        self.correct_layout(c)
        self.lora_alpha, self.ranknum = c.lora_alpha, c.init_r
        self.scaling = self.native_scaling()
        if c.lora_dropout:
            self.lora_dropout = nn.Dropout(c.lora_dropout)
        self._allocate(c.init_r, where)

    def _allocate(self, r, where):
        out, *inp = self.layer.shape
        self.r = r
        self.lora_A = nn.Parameter(torch.empty(r, torch.Size(inp).numel(), **where))
        self.lora_B = nn.Parameter(torch.empty(out, r, **where))
        self.lora_E = nn.Parameter(torch.empty(r, 1, **where))

    def reset(self, c):
        for p, std in ((self.lora_A, 0.02), (self.lora_E, 0.0), (self.lora_B, 0.02)):
            p.normal_(std=std if c.init_lora_weights else 1.0)

    def triplet_parameters(self):
        """(A, E, B): triplet i is row i of A, entry i of E and column i of B."""
        return self.lora_A, self.lora_E, self.lora_B

    @torch.no_grad()
    def rebuild(self, r):
        """Start again with r triplets."""
        old = self.triplet_parameters()
        self._allocate(r, {"device": old[0].device, "dtype": old[0].dtype})
        for new, before in zip(self.triplet_parameters(), old):
            new.requires_grad = before.requires_grad
        if not old[0].is_meta:
            self.reset(self.config)
        self.layer._changed()

    @torch.no_grad()
    def resize(self, keep):
        """Hold no more than the triplets that `keep`, one bool each, is True for."""
        old = self.triplet_parameters()
        if len(keep) != self.r:
            raise AdapterError(f"rank_pattern lists {len(keep)} triplets for {self.key}, whose adapter has {self.r}.")
        index = torch.tensor(keep, device=old[0].device).nonzero().flatten()
        self.rebuild(len(index))
        for new, before, dim in zip(self.triplet_parameters(), old, (0, 0, 1)):
            new.copy_(before.index_select(dim, index))

    @classmethod
    def to_file(cls, c, tensors):
        """Triplets that the budget left out are not saved."""
        keep, kept = _kept(c.rank_pattern), {}
        for key, t in tensors.items():
            path, _, name = key.rpartition(".")
            flags, dim = keep.get(path.removeprefix(PREFIX)), 1 if name == "lora_B" else 0
            if flags is not None and name in ("lora_A", "lora_B", "lora_E") and t.shape[dim] == len(flags):
                t = t.index_select(dim, torch.tensor(flags, device=t.device).nonzero().flatten())
            kept[key] = t
        return kept

    @classmethod
    def from_file(cls, c, tensors, adapters):
        keep = _kept(c.rank_pattern)
        for adapter in adapters:
            if (r := sum(keep.get(adapter.key, ()))) != adapter.r and adapter.key in keep:
                adapter.rebuild(r)
        return tensors

    def factor(self):
        """What B(E∘(A x)) is multiplied with."""
        return self.scaling / (self.ranknum + 1e-5)

    def native_scaling(self):
        """Before the division by the rank."""
        return float(self.lora_alpha if self.lora_alpha > 0 else self.ranknum)

    def low_rank(self):
        if not self.r:  # the budget left nothing here
            return None
        p = dropout_rate(self.lora_dropout)
        return LowRank(self.lora_A * self.lora_E, self.lora_B, self.factor(), p)

    def output(self, x, y):
        if not self.r:
            return y
        if self.kind.name == "linear":
            return lowrank.add(self.base, y, x, self.low_rank())
        x = self.cast(through(self.lora_dropout, x), self.lora_A.dtype)
        return y + self.layer.op(x, self.delta_weight().to(x.dtype)).to(y.dtype)

    def delta_weight(self):
        return (self.lora_B @ (self.lora_A * self.lora_E) * self.factor()).view(self.layer.shape)


def _kept(rank_pattern):
    """{layer: one bool a triplet}. Upstream may write the adapter's name behind the layer's."""
    return {key.partition(".lora_E")[0]: [bool(k) for k in keep] for key, keep in (rank_pattern or {}).items()}


AdaLoraLayer = layer_class("AdaLoraLayer", AdaLora)


class AdaLoraModel(LoraModel):
    """A model with AdaLoRA adapters, of which one may be trained.

    Each training step must call `update_and_allocate(step)` between backward and zero_grad.
    """

    layer_cls = AdaLoraLayer
    target_module_mapping = ADALORA_TARGETS

    file_form = Tuner.file_form  # LoRA's own is for its subtracted starts
    rankallocator = None  # made when training begins

    @property
    def trainable_adapter_name(self):
        """The adapter that is trained, or None."""
        return next(
            (n for n, c in self.peft_config.items() if isinstance(c, AdaLoraConfig) and not c.inference_mode), None
        )

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        trained = [n for n, c in self.peft_config.items() if isinstance(c, AdaLoraConfig) and not c.inference_mode]
        if len(trained) > 1:
            raise ConfigError(
                f"AdaLoRA supports only 1 trainable adapter, but {trained} would all be trained. Set "
                "inference_mode=True in the configs of all others."
            )

    def _add_to_targets(self, name, config, state_dict, how):
        Tuner._add_to_targets(self, name, config, state_dict, how)  # LoRA's own reads rank_pattern as ranks

    def _trained(self):
        """The adapters of all layers that are trained, in the model's order."""
        name = self.trainable_adapter_name
        return [layer.adapters[name] for layer in self.layers.values() if name in layer.adapters]

    def update_and_allocate(self, global_step):
        """Measure how much each triplet matters, and take away those that step `global_step`'s budget does not pay for.

        Call it in every training step after backward (before or after the optimizer's step) and before zero_grad.
        """
        config = self.peft_config[self.trainable_adapter_name]
        if self.rankallocator is None or self.rankallocator.config is not config:
            self.rankallocator = RankAllocator(config)
        self.rankallocator.step(self._trained(), global_step)

    def schedule_state(self):
        """What the budget has measured and chosen so far, {name: tensor}, for checkpoints of a training."""
        return self.rankallocator.state() if self.rankallocator is not None else {}

    def load_schedule_state(self, state):
        """Go on from what `schedule_state` gave."""
        if state:
            self.rankallocator = RankAllocator(self.peft_config[self.trainable_adapter_name])
            self.rankallocator.load_state(state)

    def resize_modules_by_rank_pattern(self, rank_pattern, adapter_name):
        """Let an adapter's layers hold only the triplets that rank_pattern, {name of a lora_E: bools}, keeps."""
        keep = _kept(rank_pattern)
        for layer in self.layers.values():
            adapter = layer.adapters.get(adapter_name)
            if adapter is not None and adapter.key in keep:
                adapter.resize(keep[adapter.key])

    def forward(self, *args, **kwargs):
        """The base model's output. A loss in it gets the orthogonality of the trained adapter added, if that acts."""
        output = super().forward(*args, **kwargs)
        loss = getattr(output, "loss", None)
        name = self.trainable_adapter_name
        if isinstance(loss, torch.Tensor) and self.state.enabled and name is not None:
            weight = self.peft_config[name].orth_reg_weight
            output.loss = loss + (weight * self.orthogonality()).to(loss)
        return output

    def orthogonality(self):
        """The mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖ over the layers of the trained adapter."""
        by_shape, count = {}, 0
        for a in self._trained():
            for rows in (a.lora_A, a.lora_B.t()):
                by_shape.setdefault(rows.shape, []).append(rows)
                count += 1
        total = 0.0
        for (r, _), rows in by_shape.items():  # one product for all layers of a shape
            rows = torch.stack(rows)
            eye = torch.eye(r, dtype=rows.dtype, device=rows.device)
            total = total + torch.linalg.vector_norm(rows @ rows.mT - eye, dim=(1, 2)).sum()
        return total / max(count, 1)

    def add_weighted_adapter(self, *args, **kwargs):
        """Always a TypeError: triplets of different trainings cannot be combined."""
        raise TypeError("AdaLoRA does not support add_weighted_adapter; use LoRA instead.")


register("ADALORA", AdaLoraConfig, tuner=AdaLoraModel, prefix="lora_", mixed=True)
