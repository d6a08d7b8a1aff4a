"""WaveFT, W + s·DWT⁻¹(S): S, one level of a wavelet transform, has a few trained entries (arXiv 2505.12532)."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Additive, Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import WAVEFT_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.seeded import check_count, places
from peft.ops import spectral, wavelets
from peft.ops.remembered import remembered
from peft.registry import register


@dataclass
class WaveFTConfig(TargetConfig):
    """WaveFT on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.WAVEFT

    n_frequency: int = field(default=2592, metadata={"help": "trained coefficients of each layer"})
    scaling: float = field(default=25.0, metadata={"help": "factor of the update"})
    wavelet_family: str = field(default="db1", metadata={"help": "db1 ... db38, sym2 ... sym20 or coif1 ... coif17"})
    use_idwt: bool = field(default=True, metadata={"help": "False: the coefficients are entries of the update itself"})
    random_loc_seed: int = field(default=777, metadata={"help": "seed of the coefficients' places"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "waveft_only"] = field(default="none", metadata={"help": "base biases to train"})
    n_frequency_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other n_frequency by layer name, name ending or regex"}
    )
    proportional_parameters: bool = field(
        default=False, metadata={"help": "n_frequency is the mean: larger layers get more, smaller ones fewer"}
    )
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (zeros), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "n_frequency", 1)
        check_range(self, "scaling")
        if self.wavelet_family not in wavelets.FAMILIES:
            raise ConfigError(
                f"WaveFTConfig.wavelet_family={self.wavelet_family!r} is not known; there are "
                f"{', '.join(wavelets.FAMILIES)}."
            )
        if self.proportional_parameters and self.n_frequency_pattern:
            warnings.warn(
                "n_frequency_pattern has no effect with proportional_parameters=True.", RuntimeWarning, stacklevel=3
            )


class WaveFT(Additive):
    """S has `spectrum` at `indices`. Where it is sparse enough, x is transformed instead of S."""

    prefix = "waveft_"
    converts = True

    waveft_spectrum = Param()  # (n,)
    waveft_n_frequency, waveft_scaling, waveft_random_loc_seed = Val(), Val(), Val()
    waveft_wavelet_family, waveft_use_idwt = Val(), Val()
    waveft_indices = Val()  # (2, n): row and column of each coefficient
    mean_size = Val(shared=True)  # numbers in the weights of all layers, over the layers

    @classmethod
    def share(cls, c, layers, where):
        sizes = [layer.shape[0] * layer.shape[1] for layer in layers.values()]
        return {"mean_size": sum(sizes) / len(sizes)}

    def build(self, c, where):
        self.correct_layout(c)
        n, shape = self._count(c), self.layer.shape
        check_count("WaveFTConfig.n_frequency", n, self)
        self.waveft_n_frequency, self.waveft_scaling, self.waveft_random_loc_seed = n, c.scaling, c.random_loc_seed
        self.waveft_wavelet_family, self.waveft_use_idwt = c.wavelet_family, c.use_idwt
        self.waveft_indices = places(shape, n, c.random_loc_seed)
        self.layout = _layout(shape, n, c.random_loc_seed, c.wavelet_family if c.use_idwt else None)
        self.waveft_spectrum = nn.Parameter(torch.empty(n, **where))

    def _count(self, c):
        if not c.proportional_parameters:
            return match.pattern_value(c.n_frequency_pattern, self.key, c.n_frequency)
        out, inp = self.layer.shape
        return max(1, round(c.n_frequency * out * inp / self.mean_size))

    def reset(self, c):
        self.waveft_spectrum.zero_() if c.init_weights else self.waveft_spectrum.normal_().mul_(0.01)

    def remakes(self):
        return None if self._sparse() else 0.0

    def output(self, x, y):
        if not self._sparse():
            return super().output(x, y)
        return y + spectral.output(x, self.waveft_spectrum * self.waveft_scaling, self.layout).to(y.dtype)

    def _sparse(self):
        return spectral.pays(self.waveft_n_frequency, self.layer.shape, least=16)

    def delta_weight(self):
        c = self.waveft_spectrum
        c = c.to(torch.promote_types(c.dtype, torch.float32))
        return self.layout.on(c.device).dense(c * self.waveft_scaling)


@remembered
def _layout(shape, n, seed, family):
    rows, cols = places(shape, n, seed)
    return spectral.entries(rows, cols, shape) if family is None else spectral.wavelets(rows, cols, shape, family)


WaveFTLayer = layer_class("WaveFTLayer", WaveFT)
WaveFTModel = tuner_class("WaveFTModel", WaveFTLayer, WAVEFT_TARGETS)
register("WAVEFT", WaveFTConfig, tuner=WaveFTModel, prefix="waveft_")
