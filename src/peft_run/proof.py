"""Proof that an adapter in memory, the same adapter read from disk, and the merged model are one and the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peft_run.deploy.probe import TOLERANCE, largest_difference, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft import PeftModel


class Proof(NamedTuple):
    """The largest absolute differences between logits, over all prompts, positions and tokens of the vocabulary."""

    adapter_effect: float  # trained - base: what the adapter changes, and so what the other two are to be held against
    reloaded: float  # reloaded - trained
    merged: float  # merged - trained

    @property
    def holds(self) -> bool:
        return self.reloaded <= TOLERANCE and self.merged <= TOLERANCE


def prove(trained: PeftModel, base: PreTrainedModel, adapter: Path, prompts: Sequence[list[int]]) -> Proof:
    """`base` must be fresh and in float32. `trained` is turned into float32 and stays so.

    In bfloat16 a merged weight is rounded to 8 bits, whatever the library does: a difference would prove nothing. The
    weights of the base are bfloat16 numbers, so float32 holds exactly those it was trained on. A quantized base is the
    one that was trained on, too; what it stands for is what the adapter is merged into.
    """
    from peft import PeftModel
    from peft_run.precision import compute_exactly

    trained = trained.float().eval()
    quantized = compute_exactly(trained.get_base_model())
    expected = logits(trained, prompts)
    with trained.disable_adapter():
        effect = largest_difference(logits(trained, prompts), expected)
    reloaded_model = PeftModel.from_pretrained(base, adapter).eval()
    compute_exactly(reloaded_model.get_base_model())
    reloaded = largest_difference(logits(reloaded_model, prompts), expected)
    merged_model = reloaded_model.merge_and_unload(**({"target": "dequantized"} if quantized else {}))
    merged = largest_difference(logits(merged_model, prompts), expected)
    return Proof(effect, reloaded, merged)
