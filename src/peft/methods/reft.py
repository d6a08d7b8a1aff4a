"""ReFT, h + Rᵀ(W h + b - R h): a few hidden states between the blocks, changed in a subspace (arXiv 2404.03592)."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Adapter, Mod, Param, Val, through
from peft.core.around import by_name
from peft.core.hidden_states import HiddenStatesLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import AdapterError, ConfigError, PeftWarning
from peft.methods.orthogonal import orthonormal_rows
from peft.methods.reft_positions import Prompts
from peft.registry import register


@dataclass
class ReftConfig(TargetConfig):
    """ReFT on the blocks of a model; without target_modules on all of them. Wrong values raise ConfigError.

    Positions are those of the prompt's tokens, padding not counted: in generate of all that it is given, in training of
    what comes before the first label that counts.
    """

    METHOD: ClassVar = PeftType.REFT

    r: int = field(default=4, metadata={"help": "dimension of the subspace in which hidden states are changed"})
    variant: Literal["loreft", "noreft", "direft"] = field(
        default="loreft",
        metadata={"help": "loreft: R has orthonormal rows; noreft: any R; direft: any R, and R h is not subtracted"},
    )
    prefix_positions: int | None = field(default=None, metadata={"help": "number of first tokens to change (3)"})
    suffix_positions: int | None = field(default=None, metadata={"help": "number of last tokens to change (3)"})
    positions: Literal["all"] | list[int] | None = field(
        default=None,
        metadata={"help": "instead of these: 'all', or numbers of tokens, from 0 on, negative ones from the end"},
    )
    intervention_per: Literal["layer", "side", "position"] = field(
        default="layer",
        metadata={"help": "what has R, W and b of its own: a layer, its first and its last tokens, or each position"},
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability of the change"})
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of the hidden states, where the model's config does not say it"}
    )
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "dropout", 0, 1)
        if self.positions is None:
            self.prefix_positions = 3 if self.prefix_positions is None else self.prefix_positions
            self.suffix_positions = 3 if self.suffix_positions is None else self.suffix_positions
            check_range(self, "prefix_positions", 0)
            check_range(self, "suffix_positions", 0)
        elif self.prefix_positions is not None or self.suffix_positions is not None:
            raise ConfigError(
                "ReftConfig.positions says all positions, so prefix_positions and suffix_positions must be left out."
            )
        if self.positions == "all" and self.intervention_per != "layer":
            raise ConfigError(
                "ReftConfig.intervention_per must be 'layer' where positions='all', as their number is not known, got "
                f"{self.intervention_per!r}."
            )
        wanted = self.wanted()
        if wanted is not None and (not wanted or len(set(wanted)) < len(wanted)):
            raise ConfigError(f"ReftConfig must name at least one position, and none twice, got {list(wanted)}.")

    def wanted(self):
        """Numbers of the tokens to change, negative ones from the end; None: all."""
        if self.positions is None:
            return (*range(self.prefix_positions), *range(-self.suffix_positions, 0))
        return None if self.positions == "all" else tuple(self.positions)

    def interventions(self):
        """For each of the wanted positions the number of its intervention, or None where there is one."""
        wanted = self.wanted() or ()
        if self.intervention_per == "position" and len(wanted) > 1:
            return tuple(range(len(wanted)))
        sides = tuple(int(n < 0) for n in wanted)
        return sides if self.intervention_per == "side" and len(set(sides)) > 1 else None


class Reft(Adapter):
    """h + Rᵀ((W - R) h + b) at chosen positions of a block's hidden states h; DiReFT: h + Rᵀ(W h + b)."""

    prefix = "reft_"
    kinds = ("block",)
    parallel = False
    folds = False

    reft_R, reft_W = Param(), Param()  # (interventions, r, width); LoReFT's R is the orthonormal form of reft_R
    reft_b = Param()  # (interventions, r)
    reft_dropout = Mod(trainable=False)
    wanted, interventions = Val(), Val()

    def build(self, c, where):
        width = c.hidden_size or self.layer.width
        if width is None:
            raise ConfigError(f"ReftConfig.hidden_size must be set: the model does not say how wide {self.key} is.")
        if c.r > width:
            raise ConfigError(f"ReftConfig.r must be at most {width}, the width of {self.key}, got {c.r}.")
        self.wanted, self.interventions = c.wanted(), c.interventions()
        count = 1 if self.interventions is None else max(self.interventions) + 1
        self.reft_R = nn.Parameter(torch.empty(count, c.r, width, **where))
        self.reft_W = nn.Parameter(torch.empty(count, c.r, width, **where))
        self.reft_b = nn.Parameter(torch.empty(count, c.r, **where))
        if c.dropout:
            self.reft_dropout = nn.Dropout(c.dropout)

    def reset(self, c):
        for R, W in zip(self.reft_R, self.reft_W):
            R.copy_(nn.init.orthogonal_(torch.empty_like(R, dtype=torch.float32)))
            nn.init.uniform_(W, -(W.shape[1] ** -0.5), W.shape[1] ** -0.5)
        self.reft_b.zero_()
        if c.init_weights and c.variant == "direft":
            self.reft_R.zero_()
        elif c.init_weights:
            self.reft_W.copy_(self.subspace())

    def subspace(self):
        """R, (interventions, r, width)."""
        return orthonormal_rows(self.reft_R) if self.config.variant == "loreft" else self.reft_R

    def output(self, x, y):
        h = y.reshape(len(y), -1, y.shape[-1])
        if h.shape[-1] != self.reft_R.shape[-1]:
            raise AdapterError(
                f"{self.key} returns hidden states of width {h.shape[-1]}, but its adapter was made for "
                f"{self.reft_R.shape[-1]}. Set ReftConfig.hidden_size, or take it out of target_modules."
            )
        call = self.layer.state.call()
        if call is None or "prompts" not in call.arguments:
            raise AdapterError(
                f"{self.key} was not called through its PeftModel, so ReFT cannot tell padding from tokens. Call that, "
                "not the base model or a part of it."
            )
        part, rows = (slice(None), len(h)) if call.part is None else call.part
        found = call.arguments["prompts"].of(self.layer.in_encoder).find(self.wanted, rows, h.shape[1], h.device)
        if found is None:
            return y
        columns, valid = found
        missed = ~valid[part].unsqueeze(-1)
        if columns is None:
            return (h + self.change(h).masked_fill(missed, 0)).view(y.shape)
        index = columns[part].unsqueeze(-1).expand(-1, -1, h.shape[-1])
        return h.scatter_add(1, index, self.change(h.gather(1, index)).masked_fill(missed, 0)).view(y.shape)

    def change(self, h):
        """What is added to hidden states (rows, positions, width)."""
        R = self.subspace()
        A, b = self.reft_W if self.config.variant == "direft" else self.reft_W - R, self.reft_b
        h, dtype = self.cast(h, R.dtype), h.dtype
        if self.interventions is None:
            change = F.linear(h, A[0], b[0]) @ R[0]
        else:
            of = list(self.interventions)
            change = torch.einsum("npr,prd->npd", torch.einsum("npd,prd->npr", h, A[of]) + b[of], R[of])
        return through(self.reft_dropout, change).to(dtype)


class ReftLayer(HiddenStatesLayer):
    """A block whose hidden states ReFT adapters change.

    width       of the hidden states; None: not known
    in_encoder  it belongs to the encoder of an encoder-decoder
    """

    adapter_cls = Reft
    width: int | None = None
    in_encoder = False


class ReftModel(Tuner):
    """A model with ReFT adapters; its forward takes prompt_lengths, a number of tokens a sample."""

    layer_cls = ReftLayer
    injectable = False  # without a tuner nobody would tell the layers what is padding
    condenses = False  # names of blocks end in numbers

    def prepare_config(self, config):
        """Without targets: all blocks that read text, or those in layers_to_transform, by name."""
        if config.target_modules is not None:
            super().prepare_config(config)
            return
        lists = [blocks for blocks in match.block_lists(self.model) if self._reads_text(blocks[0])]
        if not lists:
            raise ConfigError(
                f"{type(self.model).__name__} has no list of blocks that is known here; name its blocks in "
                r"target_modules, for example r'encoder\.layer\.\d+'."
            )
        picked, longest = config.layers_to_transform, max(len(blocks) for _, blocks in lists)
        picked = range(longest) if picked is None else [picked] if isinstance(picked, int) else sorted(picked)
        if unknown := [i for i in picked if not 0 <= i < longest]:
            raise ConfigError(f"layers_to_transform names the layers {unknown}; the model has 0 to {longest - 1}.")
        config.target_modules = {f"{key}.{i}" for key, blocks in lists for i in picked if i < len(blocks)}

    def _reads_text(self, key):
        """Whether a list of blocks is not that of images or sounds beside a language model."""
        whole, own = getattr(self.model, "config", None), self._config_of(key)
        if not hasattr(whole, "get_text_config") or own is None or self._has_encoder():
            return True
        return own.model_type in (whole.model_type, whole.get_text_config().model_type)

    def _has_encoder(self):
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _config_of(self, path):
        """The config of the nearest module above a path that has one with a width, or None."""
        while path:
            path = path.rpartition(".")[0]
            config = getattr(self.model.get_submodule(path), "config", None)
            if getattr(config, "hidden_size", None) is not None:
                return config
        return None

    def _layer_at(self, path, module, parameter=None):
        layer = super()._layer_at(path, module, parameter)
        sides = [part for part in path.split(".") if part in ("encoder", "decoder")]
        layer.in_encoder = sides[:1] == ["encoder"] and self._has_encoder()
        layer.width = getattr(layer.get_base_layer(), "out_features", None)
        if layer.width is None:
            layer.width = getattr(self._config_of(path), "hidden_size", None)
        return layer

    def call_arguments(self, args, kwargs):
        lengths = kwargs.pop("prompt_lengths", None)
        if lengths is not None:
            lengths = torch.as_tensor(lengths).flatten()
            if lengths.is_floating_point() or not len(lengths):
                raise AdapterError(f"prompt_lengths must be whole numbers, one a sample, got {lengths}.")
        given = by_name(self.model, args, kwargs)
        if given.get("output_hidden_states"):
            warnings.warn(
                "The hidden_states that transformers returns are those of the blocks alone, before ReFT changes them.",
                PeftWarning,
                stacklevel=3,
            )
        return {"prompts": Prompts(self.model, given, lengths)}

    def during_generate(self, arguments):
        return arguments["prompts"].during_generate()


register("REFT", ReftConfig, tuner=ReftModel, prefix="reft_", mixed=True)
