"""FourierFT, W + s·Re(F⁻¹(S)): S, a Fourier spectrum, has a few trained entries at random places (arXiv 2405.03003)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Additive, Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import FOURIERFT_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.seeded import check_count, places
from peft.ops import spectral
from peft.ops.remembered import remembered
from peft.registry import register


@dataclass
class FourierFTConfig(TargetConfig):
    """FourierFT on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.FOURIERFT

    n_frequency: int = field(default=1000, metadata={"help": "trained coefficients of each layer"})
    scaling: float = field(default=150.0, metadata={"help": "factor of the update"})
    random_loc_seed: int | None = field(default=777, metadata={"help": "seed of the coefficients' places"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "fourier_only", "fourierft_only"] = field(
        default="none", metadata={"help": "base biases to train"}
    )
    n_frequency_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other n_frequency by layer name, name ending or regex"}
    )
    init_weights: bool = field(default=False, metadata={"help": "start as the base model (zeros), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "n_frequency", 1)
        check_range(self, "scaling")
        if self.random_loc_seed is None:
            raise ConfigError("FourierFTConfig.random_loc_seed must be an int: no file holds the places themselves.")


class FourierFT(Additive):
    """S has `spectrum` at `indices`. Where it is sparse enough, x is transformed instead of S."""

    prefix = "fourierft_"
    converts = True

    fourierft_spectrum = Param()  # (n,)
    fourierft_n_frequency, fourierft_scaling, fourierft_random_loc_seed = Val(), Val(), Val()
    indices = Val()  # (2, n): row and column of each coefficient

    def build(self, c, where):
        self.correct_layout(c)
        n = match.pattern_value(c.n_frequency_pattern, self.key, c.n_frequency)
        check_count("FourierFTConfig.n_frequency", n, self)
        shape = self.layer.shape
        self.fourierft_n_frequency, self.fourierft_scaling = n, c.scaling
        self.fourierft_random_loc_seed, self.indices = c.random_loc_seed, places(shape, n, c.random_loc_seed)
        self.layout = _layout(shape, n, c.random_loc_seed) if spectral.pays(2 * n, shape) else None
        self.fourierft_spectrum = nn.Parameter(torch.empty(n, **where))

    def reset(self, c):
        self.fourierft_spectrum.zero_() if c.init_weights else self.fourierft_spectrum.normal_()

    def remakes(self):
        return 0.0 if self.layout is None else None

    def output(self, x, y):
        if self.layout is None:
            return super().output(x, y)
        out, inp = self.layer.shape
        values = self.fourierft_spectrum * (self.fourierft_scaling / (out * inp))
        return y + spectral.output(x, values, self.layout).to(y.dtype)

    def delta_weight(self):
        c = self.fourierft_spectrum
        S = torch.zeros(self.layer.shape, dtype=torch.promote_types(c.dtype, torch.float32), device=c.device)
        S = S.index_put(tuple(self.indices.to(c.device)), c.to(S.dtype))
        return torch.fft.ifft2(S).real * self.fourierft_scaling


@remembered
def _layout(shape, n, seed):
    return spectral.waves(*places(shape, n, seed), shape)


FourierFTLayer = layer_class("FourierFTLayer", FourierFT)
FourierFTModel = tuner_class("FourierFTModel", FourierFTLayer, FOURIERFT_TARGETS)
register("FOURIERFT", FourierFTConfig, tuner=FourierFTModel, prefix="fourierft_")
