"""Runs side by side: their measures, what their recipes differ in, and their answers to the same samples.

A difference between two runs is judged on the samples that both have answered.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peft_run.errors import RunError, UsageError
from peft_run.evaluate import report
from peft_run.evaluate.results import SHOWN, number, versus
from peft_run.metrics.table import METRICS
from peft_run.run import Run

FACTS = ("loss_last", "eval_loss", "steps", "tokens", "tokens_per_second", "peak_memory_mb", "trainable", "seconds")
LEFT_OUT = ("output.", "eval.", "track.")  # parts of a recipe that do not change the model


class Entry:
    """What is known of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.metrics: dict[str, Any] = run.read_json("metrics.json", {})
        self.result: dict[str, Any] = self.metrics.get("evaluate", {})
        self.name = run.path.name
        self.rows: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        if self.result:
            self.rows, self.arrays = read_rows(run / report.SAMPLES), read_arrays(run / report.NUMBERS)
        self.places = {key: i for i, key in enumerate(keys_of(self.rows))}

    def facts(self) -> dict[str, Any]:
        trained = self.metrics.get("train", {})
        size = sum(file.stat().st_size for file in self.run.path.glob("*.safetensors"))
        return {name: trained.get(name) for name in FACTS} | {"file_mb": round(size / 1e6, 2)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The judged samples. Raises RunError where the file is damaged or gone."""
    with whole(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if not all(isinstance(row, dict) and "key" in row for row in rows):
            raise ValueError("a line is no judged sample")
        return rows


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The numbers of the judged samples, by side and measure. Raises RunError where the file is damaged or gone."""
    with whole(path), np.load(path) as file:
        return dict(file)


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """What goes wrong in reading a file of an evaluation, as an error that says what to do."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise RunError("compare.damaged", path=path, problem=problem, run=path.parent) from error


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page shows, as JSON; the first run is what the others are held against."""
    entries = [Entry(run) for run in runs]
    if not any(entry.metrics for entry in entries):
        raise UsageError("compare.nothing")
    name(entries)
    return {
        "runs": [{"name": entry.name, "path": str(entry.run.path), **entry.facts()} for entry in entries],
        "measures": measures(entries),
        "recipes": recipes(entries),
        "samples": samples(entries),
        "not_evaluated": [entry.name for entry in entries if not entry.result],
    }


def name(entries: Sequence[Entry]) -> None:
    """The experiments' names where they tell the runs apart, else the runs' own with them."""
    groups = [entry.run.path.parent.name for entry in entries]
    for entry, group in zip(entries, groups, strict=True):
        entry.name = group if len(set(groups)) == len(groups) else f"{group}/{entry.run.path.name}"


def keys_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """What is asked, and for the how manieth time."""
    seen: dict[str, int] = {}
    keys = []
    for row in rows:
        seen[row["key"]] = seen.get(row["key"], 0) + 1
        keys.append((row["key"], seen[row["key"]]))
    return keys


# -- measures -------------------------------------------------------------------------------------------------------


def measures(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """measure -> run -> value, interval and, from the second run on, difference to the first."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.result.get("metrics", {})))
    found: dict[str, dict[str, Any]] = {}
    for metric in names:
        found[metric] = {}
        for entry in entries:
            values = entry.result.get("metrics", {}).get(metric)
            if values is None:
                continue
            kept = {name: values.get(name) for name in ("tuned", "tuned_interval", "base", "base_interval")}
            found[metric][entry.name] = kept | (against(metric, entries[0], entry) if entry is not entries[0] else {})
    return found


def against(metric: str, first: Entry, entry: Entry) -> dict[str, Any]:
    """The difference to the first run over the samples that both have; nothing where there are none."""
    stats = METRICS[metric].stats
    ours, theirs = entry.arrays.get(f"tuned/{stats}"), first.arrays.get(f"tuned/{stats}")
    if (
        ours is None
        or theirs is None
        or ours.shape[1] != theirs.shape[1]
        or entry.result.get("labels") != first.result.get("labels")
    ):
        return {}
    pairs = [(i, first.places[key]) for key, i in entry.places.items() if key in first.places]
    pairs = [(i, j) for i, j in pairs if not (np.isnan(ours[i]).any() or np.isnan(theirs[j]).any())]
    if not pairs:
        return {}
    here, there = map(list, zip(*pairs))
    return {"samples_in_common": len(pairs), **versus(METRICS[metric], theirs[there], ours[here])}


# -- recipes --------------------------------------------------------------------------------------------------------


def recipes(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """field -> its value in each run, for the fields that differ."""
    flat = [flattened(entry.run.recipe.model_dump(mode="json")) for entry in entries]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = {name: [values.get(name) for values in flat] for name in names if not name.startswith(LEFT_OUT)}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row[1:])}


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in flattened(inner, f"{prefix}{name}.").items()}
    return {prefix[:-1]: value}


# -- samples --------------------------------------------------------------------------------------------------------


def samples(entries: Sequence[Entry]) -> dict[str, list[dict[str, Any]]]:
    """Of the samples that all evaluated runs have: the best, the worst, and those on which the runs differ most."""
    judged = [entry for entry in entries if entry.rows]
    if not judged:
        return {}
    rows = []
    for key in judged[0].places:
        answers = {entry.name: entry.rows[entry.places[key]]["tuned"] for entry in judged if key in entry.places}
        quality = [answer.get("quality") for answer in answers.values()]
        if len(answers) == len(judged) and None not in quality:
            first = judged[0].rows[judged[0].places[key]]
            spread = max(quality) - min(quality)
            rows.append(
                {
                    "prompt": first["prompt"],
                    "reference": first["reference"],
                    "base": first.get("base"),
                    "tuned": answers,
                    "quality": sum(quality) / len(quality),
                    "spread": number(spread),
                }
            )
    by_quality = sorted(rows, key=lambda row: -row["quality"])
    found = {"best": by_quality[:SHOWN], "worst": by_quality[::-1][:SHOWN]}
    if len(judged) > 1:
        found["changed"] = sorted(rows, key=lambda row: -row["spread"])[:SHOWN]
    return found
