"""Written answers against references: overlap, exact match, and, where the references are a few labels, as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_run.metrics import answers, bleu, classes, units
from peft_run.metrics.rouge import rouge_l, rouge_n
from peft_run.metrics.table import BY_WORD, OVERLAPS

if TYPE_CHECKING:
    from peft_run.config.schema import Eval
    from peft_run.console import Console
    from peft_run.judges.judge import Stats

MOST_LABELS = 20
ROWS_PER_LABEL = 3  # references that repeat less than this are texts


class Writing:
    """Which measures suit these references, and what one answer adds to each."""

    def __init__(
        self, references: Sequence[str | None], settings: Eval, console: Console, *, are_labels: bool = False
    ) -> None:
        known = [reference for reference in references if reference is not None]
        self.labels = labels_among(known, certain=are_labels)
        self.by_word = settings.tokenizer == "word" and any(map(units.has_cjk, known))
        if self.by_word and not units.has_words():
            console.warn("judge.no_words")
            self.by_word = False
        if self.labels:
            self.measures: tuple[str, ...] = ("accuracy", "macro_f1")
        else:
            by_word = tuple(name + BY_WORD for name in OVERLAPS) if self.by_word else ()
            self.measures = ("exact_match", *OVERLAPS, *by_word)
        # Writing takes most of the time, so it is done only for somebody.
        self.wanted = settings.metrics == "auto" or bool(set(settings.metrics) & set(self.measures))

    def statistics(self, answer: str, reference: str) -> Stats:
        found = {"exact_match": [answers.exact(answer, reference), 1.0]}
        if self.labels:
            return {"classes": classes.statistics([answer.strip()], [reference.strip()], self.labels)} | found
        for end, split in (("", units.characters), (BY_WORD, units.words)):
            if end and not self.by_word:
                continue
            ours, theirs = split(answer, fold=True), split(reference, fold=True)
            found |= {f"rouge{n}{end}": [rouge_n(ours, theirs, n), 1.0] for n in (1, 2)}
            found[f"rougeL{end}"] = [rouge_l(ours, theirs), 1.0]
            found[f"bleu{end}"] = bleu.statistics(split(answer), split(reference))
        return found

    def quality(self, stats: Stats) -> float:
        """Of one answer. Among equally good ones, the likelier reference decides a little."""
        likely = -stats["loss"][0] / max(stats["loss"][1], 1) if "loss" in stats else 0.0
        name = "exact_match" if self.labels else "rougeL"
        return stats[name][0] + 1e-6 * likely if name in stats else likely


def labels_among(references: Sequence[str], *, certain: bool) -> list[str]:
    """The labels, sorted, where the references are labels for `certain`, or a few that repeat."""
    found = sorted({reference.strip() for reference in references})
    few = 2 <= len(found) <= MOST_LABELS and len(references) >= ROWS_PER_LABEL * len(found)
    return found if certain or few else []
