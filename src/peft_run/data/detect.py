"""Which format the rows of a file have, and which column is which field."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from peft_run.data.formats import FORMATS, Format, Row
from peft_run.errors import UsageError

# What each task can learn from, by kind of sample; data/adapt.py turns one kind into another.
KINDS = {
    "causal_lm": ("chat", "text", "label", "span", "pair"),
    "seq_cls": ("label",),
    "token_cls": ("tags",),
    "qa": ("span",),
    "seq2seq": ("pair", "chat", "label", "span"),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("rated", "preference"),
}
PROBED = 20  # rows that are looked at


class Detected(NamedTuple):
    format: Format
    mapping: dict[str, str]  # field -> column

    def fields(self, row: Row) -> Row:
        return {field: row.get(column) for field, column in self.mapping.items()}


def detect(
    rows: Sequence[Row], task: str, *, format: str = "auto", mapping: dict[str, str] | None = None, path: object = ""
) -> Detected:
    """The first format that the columns, the values and the task allow. `mapping` settles fields by hand."""
    mapping = mapping or {}
    columns = list(dict.fromkeys(column for row in rows[:PROBED] for column in row))
    if unknown := [column for column in mapping.values() if column not in columns]:
        raise UsageError("data.no_column", path=path, column=unknown[0], columns=", ".join(columns))
    if format != "auto":
        if format not in FORMATS:
            raise UsageError("data.no_format", format=format, known=", ".join(FORMATS))
        found = match(FORMATS[format], columns, mapping)
        if isinstance(found, str):
            raise UsageError("data.missing_field", path=path, format=format, field=found, columns=", ".join(columns))
        return Detected(FORMATS[format], found)
    allowed = [f for f in FORMATS.values() if f.kind in KINDS[task]]
    for candidate in sorted(allowed, key=lambda f: KINDS[task].index(f.kind) if task == "kto" else 0):
        found = match(candidate, columns, mapping)
        if isinstance(found, str) or not set(mapping) <= set(found):
            continue
        if all(candidate.fits({f: row.get(c) for f, c in found.items()}) for row in rows[:PROBED]):
            return Detected(candidate, found)
    other = other_task(rows, columns, mapping)
    if other is not None:
        raise UsageError("data.other_task", path=path, format=other.name, task=task, columns=", ".join(columns))
    wanted = "; ".join(f"{f.name}: {', '.join(f.required)}" for f in allowed)
    raise UsageError("data.unknown_columns", path=path, columns=", ".join(columns), task=task, wanted=wanted)


def match(format: Format, columns: Sequence[str], mapping: dict[str, str]) -> dict[str, str] | str:
    """field -> column; or the name of a required field that no column is for."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    found: dict[str, str] = {}
    for field, names in {**format.required, **format.optional}.items():
        column = mapping.get(field) or next((lower[name] for name in (field, *names) if name in lower), None)
        if column is None or (column in found.values() and field not in mapping):
            if field in format.required:
                return field
            continue
        found[field] = column
    return found


def other_task(rows: Sequence[Row], columns: Sequence[str], mapping: dict[str, str]) -> Format | None:
    """The format that the file has for another task."""
    for format in FORMATS.values():
        found = match(format, columns, mapping)
        if isinstance(found, dict) and all(format.fits({f: r.get(c) for f, c in found.items()}) for r in rows[:PROBED]):
            return format
    return None


USUAL = {  # kind -> the task it is usually for
    "chat": "causal_lm",
    "text": "causal_lm",
    "label": "seq_cls",
    "tags": "token_cls",
    "span": "qa",
    "pair": "causal_lm",
    "preference": "dpo",
    "rated": "kto",
}


def likely_task(rows: Sequence[Row], mapping: dict[str, str]) -> str:
    """The task that rows like these are usually for; causal_lm, whose errors then say more, where none fits."""
    columns = list(dict.fromkeys(column for row in rows[:PROBED] for column in row))
    found = other_task(rows, columns, mapping)
    return USUAL[found.kind] if found is not None else "causal_lm"


def nearest_label(label: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(label, known, n=1)
    return close[0] if close else known[0]
