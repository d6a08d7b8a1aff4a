"""The X-LoRA config, and where its experts are."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from peft.config import CONFIG_NAME, PeftConfig
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.storage import hub
from peft.weights import load_peft_weights


@dataclass
class XLoraConfig(PeftConfig):
    """A mixture of LoRA experts. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.XLORA

    hidden_size: int | None = field(default=None, metadata={"help": "width of the base model's hidden states"})
    adapters: dict[str, str] | None = field(
        default=None, metadata={"help": "the experts: {name: folder or hub id of a LoRA adapter}"}
    )
    enable_softmax: bool = field(default=True, metadata={"help": "scalings are softmax of the network's outputs"})
    enable_softmax_topk: bool = field(
        default=False, metadata={"help": "softmax over the scalings of the top_k_lora experts that are used"}
    )
    layerwise_scalings: bool = field(default=False, metadata={"help": "each layer has its own scalings"})
    xlora_depth: int = field(default=1, metadata={"help": "linear layers of the network"})
    xlora_size: int = field(default=2048, metadata={"help": "width between them"})
    xlora_dropout_p: float = field(default=0.2, metadata={"help": "dropout probability between them"})
    use_trainable_adapters: bool = field(default=False, metadata={"help": "train the experts, too"})
    softmax_temperature: float = field(default=1.0, metadata={"help": "above 1 evens the scalings out"})
    top_k_lora: int | None = field(default=None, metadata={"help": "use only so many experts for a token"})
    scaling_pass_value: float = field(
        default=0.0, metadata={"help": "scalings of all experts in the first pass; 0 is the base model"}
    )
    global_scaling_weight: float = field(default=1.0, metadata={"help": "multiplies all scalings"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "xlora_depth", 1)
        check_range(self, "xlora_size", 1)
        check_range(self, "xlora_dropout_p", 0, 1)
        check_range(self, "softmax_temperature", above=0)
        if self.top_k_lora is not None:
            check_range(self, "top_k_lora", 1)
        if self.hidden_size is None:
            warnings.warn("XLoraConfig.hidden_size is not given and taken to be 4096; set the model's.", stacklevel=3)
            self.hidden_size = 4096
        if self.adapters is None:
            warnings.warn("XLoraConfig.adapters is not given: there are no experts to mix.", stacklevel=3)
            self.adapters = {}
        if self.enable_softmax_topk and (self.top_k_lora is None or self.enable_softmax):
            warnings.warn(
                "XLoraConfig.enable_softmax_topk is meant for use with top_k_lora, and instead of enable_softmax.",
                stacklevel=3,
            )

    @property
    def experts(self):
        """Names of the experts in the order of the scalings: by name, as files do not keep the order of a dict."""
        return sorted(self.adapters, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else name))

    def found_at(self, model_id, **options):
        """Experts that were saved beside the config are preferred to where they once came from."""
        self.home = model_id, options

    def expert_tensors(self, name):
        """(config, tensors) of an expert."""
        places = [(self.adapters[name], {})]
        if "home" in self.__dict__:
            folder, options = self.home
            subfolder = f"{options['subfolder']}/{name}" if options.get("subfolder") else name
            options = {**options, "subfolder": subfolder}
            if hub.find_file(folder, CONFIG_NAME, **options) is not None:
                places.insert(0, (folder, options))
        for folder, options in places:
            tensors = load_peft_weights(folder, **options)
            if not any(k.startswith("base_model.lora_model.") for k in tensors):  # upstream has put base weights there
                return PeftConfig.from_pretrained(folder, **options), tensors
        raise ConfigError(f"Expert {name!r}: {self.adapters[name]} holds no LoRA adapter.")
