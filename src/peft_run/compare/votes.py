"""Blind votes: a person says which of two answers is better without knowing whose they are.

A vote is a line of a file: {"pair": [a, b], "key": ..., "for": a, b or "same"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_run.compare.collect import Entry
from peft_run.evaluate.report import flat

SAME = "same"
BASE = "base"


class Ballot(NamedTuple):
    """One question, and what each side answered."""

    key: str
    prompt: str
    reference: str
    answers: tuple[str, str]


def ballots(first: Entry, second: Entry | None) -> list[Ballot]:
    """Samples that both runs answered, and answered differently. second: None for the first run's base."""
    found = []
    for key, i in first.places.items():
        row = first.rows[i]
        if second is None:
            other = row.get(BASE)
        else:
            other = second.rows[second.places[key]]["tuned"] if key in second.places else None
        if other is None:
            continue
        answers = flat(row["tuned"]["answer"]), flat(other["answer"])
        if answers[0] != answers[1]:
            found.append(Ballot(f"{key[0]}-{key[1]}", row["prompt"], flat(row["reference"]), answers))
    return found


def add(file: Path, pair: Sequence[str], key: str, winner: str) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps({"pair": list(pair), "key": key, "for": winner}, ensure_ascii=False) + "\n")


def read(file: Path, pair: Sequence[str]) -> dict[str, str]:
    """key -> winner, of the votes on this pair in either order; of several votes the last counts."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    votes = [json.loads(line) for line in lines if line]
    return {vote["key"]: vote["for"] for vote in votes if sorted(vote["pair"]) == sorted(pair)}


def tally(votes: dict[str, str], pair: Sequence[str]) -> dict[str, Any]:
    """Votes by side, and how often chance alone gives a split as uneven as this (sign test; ties say nothing)."""
    count = {name: sum(winner == name for winner in votes.values()) for name in (*pair, SAME)}
    wins = [count[name] for name in pair]
    return {"votes": count, "p": sign_test(*wins) if sum(wins) else None}


def sign_test(a: int, b: int) -> float:
    """Two-sided: the probability of a split at least this uneven from fair coins."""
    total = a + b
    tails = sum(math.comb(total, i) for i in range(min(a, b) + 1)) / 2**total
    return min(1.0, 2 * tails)
