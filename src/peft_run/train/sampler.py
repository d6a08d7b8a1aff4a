"""Which samples make up which step: a function of the seed and the step's number, so that a resume needs no more."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

WINDOW = 64  # batches that are sorted by length together: enough for little padding, and order stays mostly random


class Sampler:
    """`batches(step)` gives the lists of sample numbers of one optimizer step."""

    def __init__(self, lengths: Sequence[int], *, batch: int, accumulate: int, seed: int, grouped: bool) -> None:
        self.lengths, self.batch, self.accumulate, self.seed, self.grouped = lengths, batch, accumulate, seed, grouped
        self.steps_per_epoch = math.ceil(math.ceil(len(lengths) / batch) / accumulate)
        self._epoch: tuple[int, list[list[int]]] | None = None

    def batches(self, step: int) -> list[list[int]]:
        """Of step 0, 1, ...; every epoch sees each sample once, in an order of its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.order(epoch)
        start = place * self.accumulate
        return self._epoch[1][start : start + self.accumulate]

    def order(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        numbers = list(range(len(self.lengths)))
        rng.shuffle(numbers)
        if not self.grouped:
            return [numbers[i : i + self.batch] for i in range(0, len(numbers), self.batch)]
        found = []
        for start in range(0, len(numbers), WINDOW * self.batch):
            window = sorted(numbers[start : start + WINDOW * self.batch], key=self.lengths.__getitem__)
            found += [window[i : i + self.batch] for i in range(0, len(window), self.batch)]
        rng.shuffle(found)
        return found


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """All samples in batches of like length, for scoring."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch] for i in range(0, len(order), batch)]
