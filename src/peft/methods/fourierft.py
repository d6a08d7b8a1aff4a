"""FourierFT: the update's spectrum is zero but for a few trained numbers at random places (arXiv 2405.03003)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Additive, Derived, Param, Val
from peft.core.defaults import FOURIERFT_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class FourierFTConfig(TargetConfig):
    """FourierFT on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.FOURIERFT

    n_frequency: int = field(default=1000, metadata={"help": "trained numbers of each layer"})
    scaling: int | float = field(default=150.0, metadata={"help": "the update is scaled by this"})
    random_loc_seed: int | None = field(default=777, metadata={"help": "seed of their places"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "fourier_only"] = field(default="none", metadata={"help": "base biases to train"})
    n_frequency_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other n_frequency by layer name, name ending or regex"}
    )
    init_weights: bool = field(default=False, metadata={"help": "True: start as the base model; False: at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "n_frequency", 1)
        check_range(self, "scaling")


class FourierFT(Additive):
    """W' = W + s·Re(F⁻¹(spectrum at its places)).

    The real part of the inverse transform of S is that of (S + mirrored S) / 2, which is real and symmetric, so half
    of it is enough and the transform costs half.
    """

    prefix = "fourierft_"

    fourierft_spectrum = Param()  # (n,)
    places_in_half, share = Derived(), Derived()  # (2n,) into the half spectrum (out, in / 2 + 1); (2n,) ½, or 0
    fourierft_n_frequency, fourierft_scaling = Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        n = match.pattern_value(c.n_frequency_pattern, self.key, c.n_frequency)
        if not 1 <= n <= out * inp:
            raise ConfigError(f"n_frequency={n} must be between 1 and the {out * inp} entries of {self.key}.")
        self.fourierft_n_frequency, self.fourierft_scaling = n, c.scaling
        self.fourierft_spectrum = nn.Parameter(torch.empty(n, **where))

    def derive(self, c):
        (out, inp), n = self.layer.shape, self.fourierft_n_frequency
        generator = torch.Generator().manual_seed(c.random_loc_seed)
        places = torch.randperm(out * inp, generator=generator)[:n]
        row, column = places // inp, places % inp
        rows, columns = torch.cat([row, -row % out]), torch.cat([column, -column % inp])
        inside = columns <= inp // 2
        device = self.base.weight.device
        self.places_in_half = torch.where(inside, rows * (inp // 2 + 1) + columns, 0).to(device)
        self.share = (inside * 0.5).to(device)

    def reset(self, c):
        self.fourierft_spectrum.zero_() if c.init_weights else self.fourierft_spectrum.normal_()

    def remakes(self):
        return 0.0

    def delta_weight(self):
        out, inp = self.layer.shape
        values = self.fourierft_spectrum
        values = values if values.dtype == torch.float64 else values.float()
        half = values.new_zeros(out * (inp // 2 + 1))
        half = half.index_add(0, self.places_in_half, torch.cat([values, values]) * self.share.to(values.dtype))
        half = half.view(out, -1)
        delta = torch.fft.irfft2(torch.complex(half, torch.zeros_like(half)), s=(out, inp))
        return (delta * self.fourierft_scaling).to(self.fourierft_spectrum.dtype)


class FourierFTLayer(AdapterLayer):
    """A base layer with FourierFT adapters."""

    adapter_cls = FourierFT

    def supports_lora_conversion(self, adapter_name="default"):
        return self.kind.name == "linear"


class FourierFTModel(Tuner):
    """A model with FourierFT adapters."""

    layer_cls = FourierFTLayer
    target_module_mapping = FOURIERFT_TARGETS


register("FOURIERFT", FourierFTConfig, tuner=FourierFTModel, prefix="fourierft_")
