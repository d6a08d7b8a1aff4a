"""The LoRA config."""

import importlib
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft.config import TargetConfig
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.lora.inits import check_init

MAX_RANK, MAX_LAYERS = 1 << 30, 4096  # far beyond any use: what a damaged or hostile file may ask for

# What chooses a variant: field -> (module beside this one, its adapter class, the class of the field's value).
VARIANTS = {
    "alora_invocation_tokens": ("alora", "ALora", None),
    "arrow_config": ("arrow", "Arrow", "ArrowConfig"),
    "kasa_config": ("kasa", "Kasa", "KasaConfig"),
    "monteclora_config": ("monteclora", "Monteclora", "MontecloraConfig"),
    "use_bdlora": ("bdlora", "BdLora", "BdLoraConfig"),
    "use_qalora": ("qalora", "QaLora", None),
    "velora_config": ("velora", "Velora", "VeloraConfig"),
}


# Starts of A and B that data decides: field -> (module beside this one, the class of its value, init_lora_weights).
STARTS = {
    "eva_config": ("eva", "EvaConfig", "eva"),
    "corda_config": ("corda", "CordaConfig", "corda"),
    "lora_ga_config": ("loraga", "LoraGAConfig", "lora_ga"),
    "loftq_config": ("loftq", "LoftQConfig", "loftq"),
}


@dataclass
class LoraRuntimeConfig:
    """Settings of this process only; never saved.

    ephemeral_gpu_offload: initialise DoRA on an accelerator although the weights are on the CPU.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(TargetConfig):
    """LoRA: W + s·BA, with s = lora_alpha / r (arXiv 2106.09685). Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.LORA
    NOT_SAVED: ClassVar = ("runtime_config",)
    # Settings of variants that this version cannot run: a file that uses one is refused, not loaded as plain LoRA.
    NOT_HERE: ClassVar = ("megatron_config",)

    r: int = field(default=8, metadata={"help": "rank: the width of A and B"})
    lora_alpha: int | float = field(default=8, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "lora_only"] = field(default="none", metadata={"help": "base biases to train"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r) (arXiv 2312.03732)"})
    init_lora_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: B = 0; False: both random; 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', 'olora', "
            "'mica'",
            "lora_variants": True,
        },
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other ranks by layer name, name ending or regex"}
    )
    alpha_pattern: dict[str, int | float] | None = field(
        default_factory=dict, metadata={"help": "other lora_alphas by layer name, name ending or regex"}
    )
    megatron_config: dict | None = field(default=None, metadata={"help": "Megatron-LM arguments"})
    megatron_core: str | None = field(default="megatron.core", metadata={"help": "Megatron-LM core module"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "token rows to train: of the input embedding, or by layer name"}
    )
    loftq_config: Any = field(default_factory=dict, metadata={"help": "LoftQ settings"})
    eva_config: Any = field(default=None, metadata={"help": "EVA settings"})
    corda_config: Any = field(default=None, metadata={"help": "CorDA settings"})
    lora_ga_config: Any = field(default=None, metadata={"help": "LoRA-GA settings"})
    use_dora: bool = field(
        default=False,
        metadata={"help": "train direction and magnitude apart (arXiv 2402.09353)", "is_lora_variant": True},
    )
    velora_config: Any = field(default=None, metadata={"help": "VeLoRA settings", "is_lora_variant": True})
    alora_invocation_tokens: list[int] | None = field(
        default=None, metadata={"help": "tokens that switch an activated LoRA on", "is_lora_variant": True}
    )
    use_qalora: bool = field(default=False, metadata={"help": "quantization-aware LoRA"})
    qalora_group_size: int = field(default=16, metadata={"help": "inputs that share a column of A in QA-LoRA"})
    monteclora_config: Any = field(default=None, metadata={"help": "MonteCLoRA settings", "is_lora_variant": True})
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "rebuild the decoder from these [start, end) layers (arXiv 2312.15166)"}
    )
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata={"help": "settings of this process only"}
    )
    lora_bias: bool = field(default=False, metadata={"help": "B has a bias"})
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "names or name endings of bare parameters to adapt, for example experts"}
    )
    use_bdlora: Any = field(default=None, metadata={"help": "block-diagonal LoRA settings", "is_lora_variant": True})
    arrow_config: Any = field(default=None, metadata={"help": "Arrow routing settings", "is_lora_variant": True})
    kasa_config: Any = field(default=None, metadata={"help": "KaSA settings", "is_lora_variant": True})
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "train tied embedding and head as one where either is covered"}
    )

    def __post_init__(self):
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        check_range(self, "r", 1, MAX_RANK)
        check_range(self, "lora_alpha")
        check_range(self, "lora_dropout", 0, 1)
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                if value != value or (name == "rank_pattern" and not 1 <= value <= MAX_RANK):
                    raise ConfigError(f"LoraConfig.{name}[{key!r}] must be a positive number, got {value!r}.")
        used = [n for n in self.NOT_HERE if getattr(self, n) and not (n.endswith("_config") and getattr(self, n) == {})]
        if used:
            raise ConfigError(
                f"LoraConfig.{used[0]} is not supported by this version of peft. Without it the adapter would compute "
                "something else, so it is refused rather than ignored."
            )
        check_init(self.init_lora_weights)
        self._check_starts()
        self._check_variants()
        if self.use_dora and self.lora_bias:
            raise ConfigError("lora_bias=True is not supported with use_dora=True: DoRA has no bias in B.")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"lora_bias=True needs init_lora_weights=True or False, got {self.init_lora_weights!r}: the other "
                "initialisations leave the bias undefined."
            )
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even r, got {self.r}.")
        if self.layer_replication:
            if sum(end - start for start, end in self.layer_replication) > MAX_LAYERS:
                raise ConfigError(f"LoraConfig.layer_replication asks for more than {MAX_LAYERS} layers.")
            self.layer_replication = [tuple(span) for span in self.layer_replication]

    def _check_starts(self):
        """Starts that data decides have settings, and settings are for their start only."""
        for name, (module, settings, mode) in STARTS.items():
            value = getattr(self, name)
            if value or (value is not None and name != "loftq_config"):  # whose default is {}, here and in files
                cls = getattr(importlib.import_module(f"peft.methods.lora.{module}"), settings)
                setattr(self, name, _settings(name, value, cls))
                if self.init_lora_weights != mode:
                    warnings.warn(f"LoraConfig.{name} has no effect without init_lora_weights={mode!r}.", stacklevel=4)
            elif self.init_lora_weights == mode:
                raise ConfigError(f"init_lora_weights={mode!r} needs {name}={settings}(...).")

    def _check_variants(self):
        """Make the settings of variants objects, as they are not in files; there can be those of one variant only."""
        for name, (_, _, settings) in VARIANTS.items():
            value = getattr(self, name)
            if settings and value is not None:
                setattr(self, name, _settings(name, value, _part_of_variant(name, settings)))
        chosen = [n for n in ("use_dora", *VARIANTS) if getattr(self, n)]
        chosen += ["init_lora_weights='mica'"] if chosen and self.init_lora_weights == "mica" else []
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other: each is a variant of LoRA. Choose one.")
        if self.use_qalora:
            check_range(self, "qalora_group_size", 1)
        if self.alora_invocation_tokens is not None and not len(self.alora_invocation_tokens):
            raise ConfigError("LoraConfig.alora_invocation_tokens names no token; list at least one, or leave it None.")
        if self.alora_invocation_tokens and self.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"LoraConfig.alora_invocation_tokens works for task_type='CAUSAL_LM' only, got {self.task_type!r}: it "
                "looks for the tokens in the prompt that a decoder goes on with."
            )

    @property
    def variant(self):
        """The adapter class of the variant that the config chooses, or None."""
        name = next((n for n in VARIANTS if getattr(self, n)), None)
        return None if name is None else _part_of_variant(name, VARIANTS[name][1])

    def scaling(self, r, alpha):
        """What the update is multiplied with at rank r."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def _part_of_variant(name, attribute):
    return getattr(importlib.import_module(f"peft.methods.lora.{VARIANTS[name][0]}"), attribute)


def _settings(name, value, cls):
    """The settings of a variant, which a file holds as a dict."""
    if isinstance(value, cls):
        return value
    known = [f.name for f in fields(cls)]
    if not isinstance(value, dict) or set(value) - set(known):
        raise ConfigError(
            f"LoraConfig.{name} must be a {cls.__name__}, or a dict of {', '.join(known)}, got {value!r}."
        )
    return cls(**value)
