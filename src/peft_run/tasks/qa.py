"""The answer as a span of the text. Long texts are read in overlapping windows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.data.formats import Sample
from peft_run.errors import UsageError
from peft_run.tasks.task import Batch, Task

if TYPE_CHECKING:
    import torch

OVERLAP = 0.25  # of a window, so that most answers are whole in one
LONGEST_ANSWER = 64  # tokens
HIDDEN = -1e4  # the score of places that are no answer; finite in fp16, too


class Window(NamedTuple):
    ids: array
    start: int  # of the answer's first token; 0 where this window does not hold it
    end: int  # of its last token
    first: int  # the text's tokens are ids[first:last]
    last: int
    places: tuple[tuple[int, int], ...]  # of these tokens in the text

    @property
    def length(self) -> int:
        return len(self.ids)


class QuestionAnswering(Task):
    auto_class = "AutoModelForQuestionAnswering"
    peft_type = "QUESTION_ANS"
    unit = "samples"

    def encode(self, sample: Sample) -> list[Window]:
        try:
            coded = self.tokenizer(
                sample["question"],
                sample["context"],
                truncation="only_second",
                max_length=self.max_length,
                stride=int(self.max_length * OVERLAP),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
        except Exception as error:  # no kind of its own: tokenizers leaves no room for a window
            raise UsageError("tasks.question_too_long", limit=self.max_length) from error
        wanted = (sample["start"], sample["start"] + len(sample["answer"])) if "answer" in sample else None
        return [self.window(coded, number, wanted) for number in range(len(coded["input_ids"]))]

    def window(self, coded: Any, number: int, wanted: tuple[int, int] | None) -> Window:
        ids, places = coded["input_ids"][number], coded["offset_mapping"][number]
        inside = [i for i, which in enumerate(coded.sequence_ids(number)) if which == 1]
        if not inside:
            raise UsageError("tasks.question_too_long", limit=self.max_length)
        first, last = inside[0], inside[-1] + 1
        start = end = 0
        if wanted is not None:
            held = [i for i in inside if places[i][0] < wanted[1] and places[i][1] > wanted[0]]
            whole = held and places[held[0]][0] <= wanted[0] and places[held[-1]][1] >= wanted[1]
            start, end = (held[0], held[-1]) if whole else (0, 0)
        return Window(array("i", ids), start, end, first, last, tuple(map(tuple, places[first:last])))

    def shorten(self, item: Window) -> list[Window]:
        raise AssertionError("windows have the right length")

    def check(self, items: Sequence[Window]) -> None:
        if not any(item.end for item in items):
            raise UsageError("tasks.no_answer_inside")

    def collate(self, items: Sequence[Window]) -> Batch:
        import torch

        batch = self.inputs([item.ids for item in items])
        if "token_type_ids" in self.tokenizer.model_input_names:
            kinds = [[int(item.first <= i < item.last) for i in range(item.length)] for item in items]
            batch["token_type_ids"] = self.pad(kinds, 0)
        return batch | {
            "start": torch.tensor([item.start for item in items]),
            "end": torch.tensor([item.end for item in items]),
            "first": torch.tensor([item.first for item in items]),
            "last": torch.tensor([item.last for item in items]),
            "units": len(items),
            "tokens": sum(item.length for item in items),
        }

    def logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of every place as the start and as the end, (windows, length). Place 0 is "no answer here"."""
        import torch

        out = self.run(model, batch, "token_type_ids")
        length = batch["input_ids"].shape[1]
        place = torch.arange(length, device=batch["input_ids"].device)
        allowed = (place >= batch["first"][:, None]) & (place < batch["last"][:, None]) | (place == 0)
        start, end = (scores[:, -length:].float() for scores in (out.start_logits, out.end_logits))
        return start.masked_fill(~allowed, HIDDEN), end.masked_fill(~allowed, HIDDEN)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(*self.logits(model, batch), batch)

    def loss_of(self, start: torch.Tensor, end: torch.Tensor, batch: Batch) -> torch.Tensor:
        import torch

        losses = [
            torch.nn.functional.cross_entropy(scores, batch[name], reduction="sum")
            for scores, name in ((start, "start"), (end, "end"))
        ]
        return (losses[0] + losses[1]) / 2

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        """Right: the best span is the answer, or "not here" where it is not."""
        start, end = self.logits(model, batch)
        right = sum(
            span == (int(batch["start"][row]), int(batch["end"][row]))
            for row, span in enumerate(best_spans(start, end))
        )
        loss = self.loss_of(start, end, batch).item()
        return {"loss": loss, "units": batch["units"], "right": right, "asked": batch["units"]}


def best_spans(start: torch.Tensor, end: torch.Tensor) -> list[tuple[int, int]]:
    """The likeliest (first, last) token of every window, (0, 0) for none; never one that ends before it starts."""
    import torch

    length = start.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=start.device).triu().tril(LONGEST_ANSWER - 1)
    allowed[0, 1:] = False
    sums = (start[:, :, None] + end[:, None, :]).masked_fill(~allowed, 2 * HIDDEN)
    best = sums.flatten(1).argmax(1).tolist()
    return [divmod(place, length) for place in best]
