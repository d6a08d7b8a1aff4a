"""The data of a recipe: files read, rows understood, labels named, a part held out."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_run.config import Recipe, Source
from peft_run.data.adapt import adapt
from peft_run.data.detect import detect, nearest_label
from peft_run.data.formats import BadRow, Sample
from peft_run.data.read import read
from peft_run.errors import UsageError
from peft_run.files import sha256

SHOWN = 3  # bad rows that an error lists


@dataclass
class File:
    """What one source gave."""

    path: str
    format: str
    mapping: dict[str, str]
    columns: list[str]
    rows: int
    dropped: int
    sha256: str


@dataclass
class Dataset:
    """Samples by part, and what is known of where they came from."""

    train: list[Sample]
    eval: list[Sample]
    labels: list[str] = field(default_factory=list)  # of the classes or tags, in the order of the model's outputs
    files: dict[str, list[File]] = field(default_factory=dict)  # by part
    duplicates: int = 0  # training rows that are there already
    leaked: int = 0  # held-out rows that are in the training data too


def load_dataset(recipe: Recipe) -> Dataset:
    """Everything that training reads. Raises UsageError for what cannot be learnt from."""
    data = recipe.data
    if not data.train:
        raise UsageError("data.none")
    files: dict[str, list[File]] = {"train": [], "eval": []}
    train = [sample for source in data.train for sample in load_source(source, recipe, files["train"])]
    train, duplicates = without_duplicates(train, data.deduplicate)
    if data.eval.path is not None:
        source = Source(**data.eval.model_dump(exclude={"split"}))
        held_out = load_source(source, recipe, files["eval"])
    else:
        train, held_out = split(train, data.eval.split, data.seed)
    if not train:
        raise UsageError("data.nothing_left")
    dataset = Dataset(train, held_out, [], files, duplicates)
    dataset.labels = labels_of(dataset, recipe)  # of all rows: the outputs of the model do not depend on the fraction
    dataset.train = part_of(train, data.fraction, data.seed)
    seen = {key_of(sample) for sample in dataset.train}
    dataset.leaked = sum(key_of(sample) in seen for sample in held_out)
    return dataset


def load_test(recipe: Recipe, labels: list[str]) -> list[Sample]:
    """The samples of `data.test`; where there are none, the held-out part."""
    if not recipe.data.test:
        return load_dataset(recipe).eval
    samples = [sample for source in recipe.data.test for sample in load_source(source, recipe, [])]
    check_labels(samples, labels)
    return samples


def load_source(source: Source, recipe: Recipe, files: list[File]) -> list[Sample]:
    """The samples of one file or folder; what it was is added to `files`."""
    path = recipe.at(source.path)
    rows = read(path, encoding=source.encoding, sheet=source.sheet)
    found = detect(rows, recipe.task, format=source.format, mapping=source.map, path=source.path)
    numbered = list(enumerate(rows, 1))
    if source.sample is not None and source.sample < len(rows):
        numbered = sorted(random.Random(recipe.data.seed).sample(numbered, source.sample))
    samples: list[Sample] = []
    bad: list[tuple[int, BadRow]] = []
    for number, row in numbered:
        try:
            sample = rename(found.format.sample(found.fields(row)), recipe)
            samples += adapt(sample, found.format.kind, recipe.task, recipe.data)
        except BadRow as error:
            bad.append((number, error))
    if bad and (recipe.data.invalid == "error" or not samples):
        raise refuse(bad, source.path)
    columns = list(dict.fromkeys(column for row in rows[:100] for column in row))
    files.append(File(source.path, found.format.name, found.mapping, columns, len(rows), len(bad), fingerprint(path)))
    return samples


def refuse(bad: list[tuple[int, BadRow]], path: str) -> UsageError:
    from peft_run.messages import sentence

    _, first = bad[0]
    places = ", ".join(str(number) for number, _ in bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
    error = UsageError("data.bad_rows", path=path, count=len(bad), rows=places, problem="")
    # The reason is a sentence of its own, in whichever language the error is told.
    error.tell = lambda language: sentence(  # type: ignore[method-assign]
        "data.bad_rows",
        language,
        path=path,
        count=len(bad),
        rows=places,
        problem=sentence(first.key, language, **first.values),
    )
    return error


def rename(sample: Sample, recipe: Recipe) -> Sample:
    """Labels as the recipe calls them."""
    names = recipe.data.labels
    if isinstance(names, dict) and "label" in sample:
        if sample["label"] not in names and sample["label"] not in names.values():
            raise UsageError("data.unknown_label", label=sample["label"], known=", ".join(names))
        return {**sample, "label": names.get(sample["label"], sample["label"])}
    return sample


def labels_of(dataset: Dataset, recipe: Recipe) -> list[str]:
    """The labels in the order of the model's outputs: as the recipe lists them, else sorted (numbers as numbers)."""
    given, task = recipe.data.labels, recipe.task
    if task not in ("seq_cls", "token_cls"):
        return []
    found = {label for sample in dataset.train for label in sample_labels(sample)}
    if given:
        labels = list(dict.fromkeys(given.values() if isinstance(given, dict) else given))
    else:
        labels = sorted(found, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))
    check_labels([*dataset.train, *dataset.eval], labels)
    if len(found) < 2:
        raise UsageError("data.one_label", label=next(iter(found)))
    return labels


def sample_labels(sample: Sample) -> list[str]:
    return sample["tags"] if "tags" in sample else [sample["label"]] if "label" in sample else []


def check_labels(samples: list[Sample], labels: list[str]) -> None:
    known = set(labels)
    if not known:
        return
    for sample in samples:
        for label in sample_labels(sample):
            if label not in known:
                near = nearest_label(label, labels)
                raise UsageError("data.label_not_trained", label=label, known=", ".join(labels[:20]), nearest=near)


def key_of(sample: Sample) -> str:
    """Equal for samples that ask the same, whatever the answer, spaces and case."""
    asked = {
        name: [m for m in value if m["role"] != "assistant"] or value if name == "messages" else value
        for name, value in sample.items()
        if name in ("messages", "text", "pair", "source", "question", "context", "tokens")
    }
    flat = "".join(json.dumps(asked, ensure_ascii=False, sort_keys=True).split()).casefold()
    return hashlib.blake2b(flat.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def without_duplicates(samples: list[Sample], drop: bool) -> tuple[list[Sample], int]:
    """How many samples are there already, answer included; without them, if asked."""
    seen: set[str] = set()
    first = []
    for sample in samples:
        key = json.dumps(sample, ensure_ascii=False, sort_keys=True)
        if key not in seen:
            first.append(sample)
            seen.add(key)
    return (first if drop else samples), len(samples) - len(first)


def split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a share of each label. Samples that ask the same go to one side, so that nothing leaks."""
    if share == 0:
        return samples, []
    groups: dict[str, list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault(key_of(sample), []).append(position)
    strata: dict[str, list[list[int]]] = {}
    for members in groups.values():
        strata.setdefault(str(samples[members[0]].get("label")), []).append(members)
    rng = random.Random(seed)
    held_out: set[int] = set()
    for label in sorted(strata):
        stratum = rng.sample(strata[label], len(strata[label]))
        wanted = round(share * sum(map(len, stratum)))
        taken = 0
        for members in stratum[:-1]:  # at least one group of every label is trained on
            if taken >= wanted:
                break
            held_out.update(members)
            taken += len(members)
    keep = [s for position, s in enumerate(samples) if position not in held_out]
    return keep, [samples[position] for position in sorted(held_out)]


def part_of(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """A share of the samples, in their order. For one seed, a larger share contains every smaller one."""
    if fraction == 1:
        return samples
    strata: dict[str, list[int]] = {}
    for position, sample in enumerate(samples):
        strata.setdefault(str(sample.get("label")), []).append(position)
    rng = random.Random(f"fraction-{seed}")
    # One order for all shares, in which every beginning has the labels in proportion.
    order: list[tuple[float, int]] = []
    for label in sorted(strata):
        members = rng.sample(strata[label], len(strata[label]))
        order += [((rank + 0.5) / len(members), position) for rank, position in enumerate(members)]
    count = max(1, round(fraction * len(samples)))
    return [samples[position] for position in sorted(position for _, position in sorted(order)[:count])]


def fingerprint(path: Path) -> str:
    """sha256 of a file; of the names and contents of all files in a folder."""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def describe(dataset: Dataset) -> dict[str, Any]:
    """For env.json."""
    return {part: [vars(file) for file in files] for part, files in dataset.files.items() if files}
