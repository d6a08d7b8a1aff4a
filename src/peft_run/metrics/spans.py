"""Entities in tags. An entity is right only as a whole: type, first and last token.

B begins an entity, I goes on with one of the same type; with BIOES (or BMES, BILOU) it must also end with E or be a
lone S. What does not follow these rules is no entity. Where the tags know no B, a run of one type is an entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

TAG = re.compile(r"([BIESMLU])[-_](.+)")
SAME = {"M": "I", "L": "E", "U": "S"}

Entity = tuple[str, int, int]  # type, first token, last token


def parts(tag: str) -> tuple[str, str]:
    """B-PER -> ("B", "PER"); other tags are outside."""
    found = TAG.fullmatch(tag)
    return (SAME.get(found[1], found[1]), found[2]) if found else ("O", "")


def has_entities(labels: Iterable[str]) -> bool:
    """Whether these tags mark entities, and not, for example, parts of speech."""
    return any(parts(label)[0] != "O" for label in labels)


def scheme(labels: Iterable[str]) -> str:
    marks = {parts(label)[0] for label in labels}
    return "BIOES" if marks & {"E", "S"} else "BIO" if "B" in marks else "IO"


def entities(tags: Sequence[str], scheme: str) -> set[Entity]:
    found: set[Entity] = set()
    start: int | None = None  # of the entity that is open
    kind = ""
    for i, (mark, type_) in enumerate([*map(parts, tags), ("O", "")]):
        goes_on = start is not None and mark in ("I", "E") and type_ == kind
        if start is not None and not goes_on:
            if scheme != "BIOES":  # there an entity that no E has closed is none
                found.add((kind, start, i - 1))
            start = None
        if mark == "S":
            found.add((type_, i, i))
        elif mark == "E" and goes_on:
            found.add((kind, start, i))  # type: ignore[arg-type]
            start = None
        elif mark == "B" or (mark == "I" and scheme == "IO" and start is None):
            start, kind = i, type_
    return found


def statistics(tags: Sequence[str], reference: Sequence[str], scheme: str) -> list[float]:
    """[right, found, wanted]"""
    ours, theirs = entities(tags, scheme), entities(reference, scheme)
    return [len(ours & theirs), len(ours), len(theirs)]
