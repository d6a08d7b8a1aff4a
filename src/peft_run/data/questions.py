"""Rows to be answered: the formats of training, without the answers.

A column that holds answers may be there; the model does not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_run.config import Recipe
from peft_run.config.schema import PREFERENCES
from peft_run.data.adapt import adapt
from peft_run.data.detect import KINDS, PROBED, match
from peft_run.data.formats import FORMATS, BadRow, Format, Row, Sample, plain, turns, words
from peft_run.errors import UsageError

ANSWERS = {"label", "tags", "answers", "start", "target", "output", "completion"}  # fields that are not asked for
STAND_IN = "?"  # for answers, until the sample is made


def find(
    rows: Sequence[Row], recipe: Recipe, trained: dict[str, Any], mapping: dict[str, str], path: object
) -> tuple[Format, dict[str, str]]:
    """The format of these rows and its columns: that of the training data, where the columns are there."""
    columns = list(dict.fromkeys(column for row in rows[:PROBED] for column in row))
    if missing := [column for column in mapping.values() if column not in columns]:
        raise UsageError("data.no_column", path=path, column=missing[0], columns=", ".join(columns))
    task = task_of(recipe)
    allowed = [f for f in FORMATS.values() if f.kind in KINDS[task]]
    first = FORMATS.get(trained.get("format", ""))
    if first in allowed:
        allowed.sort(key=lambda f: f is not first)
    for candidate in allowed:
        asked = without_answers(candidate)
        known = trained.get("mapping", {}) if candidate is first else {}
        known = {field: column for field, column in known.items() if column in columns and field not in ANSWERS}
        found = match(asked, columns, {**known, **mapping})
        if isinstance(found, str) or not set(mapping) <= set(found):
            continue
        if all(candidate.fits({f: row.get(c) for f, c in found.items()}) for row in rows[:PROBED]):
            return asked, found
    wanted = "; ".join(f"{f.name}: {', '.join(without_answers(f).required)}" for f in allowed)
    raise UsageError("data.unknown_columns", path=path, columns=", ".join(columns), task=task, wanted=wanted)


def without_answers(format: Format) -> Format:
    required = {field: names for field, names in format.required.items() if field not in ANSWERS}
    optional = {field: names for field, names in format.optional.items() if field not in ANSWERS}
    return format._replace(required=required, optional=optional)


def question(row: Row, format: Format, mapping: dict[str, str], recipe: Recipe) -> Sample:
    """The sample of a row, as in training, without its answer. Raises BadRow.

    A chat, or a text to go on from, stands under `ask`: nothing of it is an answer to be scored.
    """
    fields = {field: row.get(column) for field, column in mapping.items()}
    if format.kind == "text":
        return {"ask": format.sample(fields)["text"]}
    (sample,) = adapt(with_stand_in(fields, format), format.kind, task_of(recipe), recipe.data)
    if "messages" in sample:
        return {"ask": sample["messages"][:-1]}
    return {name: value for name, value in sample.items() if name not in ("label", "tags", "answer", "start", "target")}


def with_stand_in(fields: Row, format: Format) -> Sample:
    if "messages" in format.required:
        messages = turns(fields["messages"])
        if messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise BadRow("data.no_messages")
        return format.sample({**fields, "messages": [*messages, {"role": "assistant", "content": STAND_IN}]})
    answers: dict[str, Any] = dict.fromkeys(FORMATS[format.name].required.keys() & ANSWERS, STAND_IN)
    if "tags" in answers:
        answers["tags"] = [STAND_IN] * len(words(fields["tokens"]))
    if "answers" in answers:  # an answer must be in the text
        answers["answers"] = plain(fields["context"]).strip()[:1] or STAND_IN
    return format.sample({**fields, **answers})


def task_of(recipe: Recipe) -> str:
    return "causal_lm" if recipe.task in PREFERENCES else recipe.task
