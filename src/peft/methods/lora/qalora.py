"""QA-LoRA: A reads the means of groups of inputs, so that a merge changes zero points only (arXiv 2309.14717)."""

from peft.errors import ConfigError
from peft.layers.linear import linear
from peft.methods.lora.lora import Lora


class QaLora(Lora):
    """s·B·A on (in / group) · the means of groups of x; A is (r, in / group)."""

    kinds = ("linear",)
    title = "QA-LoRA"
    storages = ("gptq", "gptqmodel")  # whose groups it is for; elsewhere upstream trains a plain LoRA without a word

    def build(self, c, where):
        super().build(c, where)
        self.lora_A = linear(self.layer.shape[1] // c.qalora_group_size, self.r, False, **where)

    def _check_layer(self, c):
        super()._check_layer(c)
        inp, size = self.layer.shape[1], c.qalora_group_size
        if self.layer.backend.name not in self.storages:
            raise ConfigError(
                f"use_qalora=True is for layers quantized with GPTQ, and {self.key} is a plain "
                f"{type(self.base).__name__}. Leave use_qalora at False there: it would only be a weaker LoRA."
            )
        if inp % size:
            raise ConfigError(f"qalora_group_size={size} must divide the width {inp} of {self.key}.")
        if c.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={c.init_lora_weights!r} fills an A of the full width; with use_qalora use True, "
                "False or 'gaussian'."
            )

    def effective_factors(self):
        A, size = self.lora_A.weight, self.config.qalora_group_size
        return A.repeat_interleave(size, 1) * (A.shape[1] / size), self.lora_B.weight

    def low_rank(self):
        return self.pair(*self.effective_factors(), self.lora_B.bias)
