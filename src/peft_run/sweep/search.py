"""Which trial comes next: the points of a grid or of a random draw, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from peft_run.errors import UsageError
from peft_run.sweep.folder import DONE, FAILED, PRUNED, Folder
from peft_run.sweep.settings import Settings
from peft_run.sweep.space import Point, Space

ENDED = (DONE, PRUNED, FAILED)


class Search(Protocol):
    total: int  # trials in all

    def upcoming(self) -> Iterator[tuple[int, Point]]:
        """Number and point of each trial that is still to be run, or to be finished."""

    def evaluated(self, number: int, event: dict[str, Any]) -> bool:
        """Hear of an evaluation in the middle of a trial. Whether to go on with it."""

    def ended(self, number: int, result: dict[str, Any]) -> None:
        """Hear how a trial ended."""


class Listed:
    """All points are known from the start, so a trial's number says which point it is."""

    def __init__(self, folder: Folder, settings: Settings, space: Space) -> None:
        self.folder = folder
        points = space.grid() if settings.search == "grid" else space.random(settings.seed)
        self.points = list(itertools.islice(points, settings.trials))
        self.total = len(self.points)

    def upcoming(self) -> Iterator[tuple[int, Point]]:
        known = self.folder.trials()
        for number, point in enumerate(self.points):
            if known.get(number, {}).get("state") not in ENDED:
                yield number, point

    def evaluated(self, number: int, event: dict[str, Any]) -> bool:
        return True

    def ended(self, number: int, result: dict[str, Any]) -> None:
        pass


def check(settings: Settings, space: Space) -> None:
    """Raises UsageError, before anything is written, for what cannot be searched so."""
    if settings.search == "grid":
        next(space.grid())
        if settings.trials is not None and settings.trials < space.size:
            raise UsageError("sweep.part_of_grid", size=int(space.size), trials=settings.trials)
    elif settings.search == "tpe":
        from peft_run.packages import require

        require("optuna", extra="sweep")


def make(folder: Folder, settings: Settings, space: Space) -> Search:
    if settings.search != "tpe":
        return Listed(folder, settings, space)
    from peft_run.sweep.study import Study

    return Study(folder, settings, space)
