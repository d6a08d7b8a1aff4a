"""What a model answers to samples of a task, and how good that is: one file a kind of task."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_run.config.schema import PREFERENCES

if TYPE_CHECKING:
    from peft_run.artefact import Tuned
    from peft_run.config.schema import Eval
    from peft_run.console import Console
    from peft_run.data.formats import Sample
    from peft_run.judges.judge import Judge

HOMES = {  # task -> the class in peft_run/judges
    "causal_lm": "chat.ChatJudge",
    "seq2seq": "seq2seq.Seq2SeqJudge",
    "seq_cls": "label.LabelJudge",
    "token_cls": "tags.TagJudge",
    "qa": "span.SpanJudge",
    "dpo": "preference.PreferenceJudge",
    "orpo": "preference.PreferenceJudge",
    "kto": "preference.PreferenceJudge",
}
WRITES = {**HOMES, **dict.fromkeys(PREFERENCES, "chat.ChatJudge")}  # to answer, not to be judged


def make(
    tuned: Tuned, samples: Sequence[Sample], settings: Eval, console: Console, *, answer_only: bool = False
) -> Judge:
    """The judge of a run's task over these samples; `answer_only` for samples without a reference."""
    file, _, name = (WRITES if answer_only else HOMES)[tuned.recipe.task].partition(".")
    return getattr(importlib.import_module(f"peft_run.judges.{file}"), name)(tuned, samples, settings, console)
