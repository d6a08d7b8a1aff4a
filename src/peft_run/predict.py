"""Answers to the rows of a file, by a tuned model, rendered as in training."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run import judges
from peft_run.console import Console, silent
from peft_run.data.dataset import refuse
from peft_run.data.formats import BadRow
from peft_run.data.questions import find, question
from peft_run.data.read import read
from peft_run.errors import UsageError
from peft_run.evaluate.changes import load_tuned
from peft_run.files import check_parent, new_file
from peft_run.run import Run
from peft_run.waiting import counted

if TYPE_CHECKING:
    from peft_run.artefact import Tuned
    from peft_run.config import Recipe
    from peft_run.data.formats import Row, Sample
    from peft_run.judges.judge import Seen

ANSWER = "prediction"
WINDOW = 32  # batches that are sorted by length together, then written
KINDS = (".jsonl", ".csv")


def predict(
    run: Run,
    source: Path,
    target: Path | None,
    recipe: Recipe | None = None,
    console: Console | None = None,
    *,
    mapping: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Each row of `source` with its `prediction`, in `target`, or as JSON lines on stdout.

    The file appears when it is complete. A row that cannot be asked is refused, or left without an answer where the
    recipe has data.invalid=drop.
    """
    console, recipe = console or silent(), recipe or run.recipe
    check_target(target)
    rows = read(source)
    trained = next(iter(run.read_json("env.json", {}).get("data", {}).get("train", [])), {})
    format, columns = find(rows, recipe, trained, mapping or {}, source)
    console("predict.reading", count=len(rows), format=format.name, mapping=arrows(columns))
    samples = questions(rows, source, recipe, lambda row: question(row, format, columns, recipe))
    tuned = load_tuned(run, recipe)
    with counted(console, len(rows)) as count, writer(target, rows) as write:
        for row, seen in zip(rows, answers(tuned, samples, recipe, console)):
            write({**row, ANSWER: None if seen is None else seen.answer, **(seen.more if seen else {})})
            count(1)
    answered = sum(sample is not None for sample in samples)
    if target is not None:
        console("predict.done", count=answered, path=target)
    return {"rows": len(rows), "answered": answered, "output": None if target is None else str(target)}


def questions(rows: Sequence[Row], source: Path, recipe: Recipe, ask: Callable[[Row], Sample]) -> list[Sample | None]:
    """A sample for each row; None for one that cannot be asked."""
    samples: list[Sample | None] = []
    bad: list[tuple[int, BadRow]] = []
    for number, row in enumerate(rows, 1):
        try:
            samples.append(ask(row))
        except BadRow as error:
            bad.append((number, error))
            samples.append(None)
    if bad and (recipe.data.invalid == "error" or len(bad) == len(rows)):
        raise refuse(bad, str(source))
    return samples


def answers(tuned: Tuned, samples: Sequence[Sample | None], recipe: Recipe, console: Console) -> Iterator[Seen | None]:
    """What the model answers, in the order of the samples."""
    settings = recipe.eval.model_copy(update={"metrics": "auto"})
    window = WINDOW * settings.batch
    for start in range(0, len(samples), window):
        part = samples[start : start + window]
        asked = [i for i, sample in enumerate(part) if sample is not None]
        found: list[Seen | None] = [None] * len(part)
        if asked:
            judge = judges.make(tuned, [part[i] for i in asked], settings, console, answer_only=True)
            for numbers in judge.batches():
                for number, seen in zip(numbers, judge.look(tuned.model, numbers), strict=True):
                    found[asked[number]] = seen
        yield from found


# -- files ----------------------------------------------------------------------------------------------------------


def check_target(target: Path | None) -> None:
    if target is None:
        return
    if target.suffix.lower() not in KINDS:
        raise UsageError("predict.unknown_kind", path=target, known=", ".join(KINDS))
    check_parent(target)


@contextmanager
def writer(target: Path | None, rows: Sequence[Row]) -> Iterator[Callable[[Row], None]]:
    """Gives a function that writes one row."""
    if target is None:
        yield lambda row: print(line(row), file=sys.stdout, flush=True)
        return
    with new_file(target) as binary:
        # A byte-order mark, because Excel takes a csv file without one for the system's old encoding.
        is_csv = target.suffix.lower() == ".csv"
        text = io.TextIOWrapper(binary, encoding="utf-8-sig" if is_csv else "utf-8", newline="", write_through=True)
        yield csv_writer(text, rows) if is_csv else lambda row: print(line(row), file=text)
        text.detach()


def line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def csv_writer(file: Any, rows: Sequence[Row]) -> Callable[[Row], None]:
    """Columns as in the input, then the answer and what is known of it; lists and objects as JSON."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != ANSWER))
    table: csv.DictWriter | None = None

    def write(row: Row) -> None:
        nonlocal table
        if table is None:
            table = csv.DictWriter(file, list(dict.fromkeys([*columns, *row])), extrasaction="ignore")
            table.writeheader()
        table.writerow({name: cell(value) for name, value in row.items()})

    return write


def cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def arrows(columns: dict[str, str]) -> str:
    return ", ".join(f"{field} <- {column}" for field, column in columns.items())
