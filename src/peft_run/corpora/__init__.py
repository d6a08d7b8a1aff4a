"""Real data for the recipes: taken out of packages of public registries, split, and written as files to train on.

Nothing of it is part of this package. Each corpus is a module with

    SOURCE, LICENCE    the package and what it says of its licence
    ABOUT              a line in each language
    load(sources)      -> Parts
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peft_run.corpora.sources import Sources
from peft_run.errors import UsageError
from peft_run.files import new_folder, sha256, write_json, write_text

if TYPE_CHECKING:
    from peft_run.console import Console

NAMES = ("zh-sentiment", "zh-summary", "zh-qa", "zh-poem")  # each is called like the recipe that it is for
TRAIN, TEST, ORIGIN = "train.jsonl", "test.jsonl", "origin.json"


def module(name: str) -> ModuleType:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)
        raise UsageError("corpora.none", name=name, nearest=near[0], known=", ".join(NAMES))
    return importlib.import_module(f"peft_run.corpora.{name.replace('-', '_')}")


def fetch(name: str, folder: Path, console: Console, *, offline: bool = False) -> dict[str, Any]:
    """Write train.jsonl, test.jsonl and origin.json into the new folder; origin.json's content.

    No text of the test part is in the training part. Raises UsageError where the folder is not empty, or where
    `offline` forbids to fetch what is not here yet; RunError where what comes is not what is expected.
    """
    from peft_run.deploy.merge import check_free

    corpus = module(name)
    check_free(folder)
    sources = Sources(console, offline=offline)
    parts = corpus.load(sources)
    with new_folder(folder) as beside:
        for file, rows in ((TRAIN, parts.train), (TEST, parts.test)):
            write_text(beside / file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        origin = {
            "corpus": name,
            "source": corpus.SOURCE,
            "licence": corpus.LICENCE,
            "source_sha256": sources.used,
            "rows": {TRAIN: len(parts.train), TEST: len(parts.test)},
            "sha256": {file: sha256(beside / file) for file in (TRAIN, TEST)},
        }
        write_json(beside / ORIGIN, origin)
    console("corpora.written", path=folder, train=len(parts.train), test=len(parts.test))
    console("corpora.licence", source=corpus.SOURCE, licence=corpus.LICENCE)
    for file, digest in {**sources.used, **origin["sha256"]}.items():
        console("corpora.checksum", file=file, sha256=digest)
    return origin
