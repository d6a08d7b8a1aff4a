"""Rows for training and rows for testing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

SEED = 0

Row = dict[str, Any]


class Parts(NamedTuple):
    train: list[Row]
    test: list[Row]


def split(groups: Sequence[Sequence[Row]], test: int) -> Parts:
    """About `test` rows in the second part. Rows of a group, which share text, go to one part."""
    shuffled = random.Random(SEED).sample(list(groups), len(groups))
    parts = Parts([], [])
    for group in shuffled:
        (parts.test if len(parts.test) < test else parts.train).extend(group)
    return parts
