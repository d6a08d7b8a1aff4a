"""What all judges share: samples as items in batches of like length, and which measures there are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.console import Console
from peft_run.data.formats import Sample
from peft_run.errors import UsageError
from peft_run.train.loop import moved
from peft_run.train.sampler import by_length

if TYPE_CHECKING:
    from torch import nn

    from peft_run.artefact import Tuned
    from peft_run.config.schema import Eval
    from peft_run.tasks.task import Batch

Stats = dict[str, list[float]]  # what a sample adds to the sums of each measure


class Seen(NamedTuple):
    """One model's answer to one sample."""

    answer: Any = None  # as JSON; None where the task only scores what is there
    stats: Stats = {}  # empty where there is no reference
    more: dict[str, Any] = {}  # what else is known of the answer, such as probabilities


class Judge:
    measures: Sequence[str] = ()  # names in metrics.table.METRICS
    tuned_only: Sequence[str] = ()  # those that mean nothing for a base
    labels: Sequence[str] = ()  # where answers are labels

    def __init__(self, tuned: Tuned, samples: Sequence[Sample], settings: Eval, console: Console) -> None:
        self.tuned, self.samples, self.settings, self.console = tuned, samples, settings, console
        self.task, self.tokenizer, self.device = tuned.task, tuned.tokenizer, tuned.device
        self.items = self.encode()

    def prompt(self, number: int) -> str:
        """The sample as a person reads it."""
        raise NotImplementedError

    def reference(self, number: int) -> Any:
        raise NotImplementedError

    def look(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        """What the model makes of these samples, in one batch; nothing of those that have no item."""
        kept = [i for i in numbers if self.items[i]]
        found = dict(zip(kept, self.judged(model, kept), strict=True)) if kept else {}
        return [found.get(i, Seen()) for i in numbers]

    def judged(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        """The same, for samples that have an item."""
        raise NotImplementedError

    def quality(self, seen: Seen) -> float:
        """By which samples are ranked, the best highest."""
        return -seen.stats["loss"][0] / max(seen.stats["loss"][1], 1)

    # -- shared by judges ---------------------------------------------------------------------------------------------

    def encode(self) -> list[list[Any]]:
        """The items of each sample: none where it is too long for the recipe, several where it was split."""
        quiet = Console(quiet=True, stream=io.StringIO())
        found: list[list[Any]] = []
        for sample in self.samples:
            try:
                found.append(self.task.encode_all([sample], quiet, training=False))
            except UsageError as error:
                if error.key != "template.all_dropped":
                    raise
                found.append([])
        if empty := sum(not items for items in found):
            self.console.warn("judge.dropped", count=empty, total=len(found), limit=self.task.max_length)
        return found

    def batches(self) -> list[list[int]]:
        """Numbers of samples, those of like length together."""
        return by_length([self.length(number) for number in range(len(self.samples))], self.settings.batch)

    def learnt_labels(self) -> bool:
        """Whether the answers that were learnt are labels, written out."""
        files = self.tuned.run.read_json("env.json", {}).get("data", {}).get("train", [])
        return bool(files) and all(file["format"] == "classification" for file in files)

    def length(self, number: int) -> int:
        return sum(item.length for item in self.items[number])

    def collate(self, items: Sequence[Any]) -> Batch:
        return moved(self.task.collate(items), self.device)
