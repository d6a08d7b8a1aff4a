"""Couplets of Tang poems: a line, and the line that answers it, of equal length."""

from __future__ import annotations

import json
import random
import re

from peft_run.corpora.parts import SEED, Parts, Row, split
from peft_run.corpora.sources import Sources, members

SOURCE = "npm: chinese-poetry 2.0.1, poems of the Tang"
LICENCE = "MIT (of the package); the poems are in the public domain"
ABOUT = {"en": "couplets of Tang poems: a line and its answer", "zh": "唐诗对句：上句与下句"}

VERSION = "2.0.1"
SHA256 = "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"
COUPLET = re.compile(r"([\u4e00-\u9fff]{5}|[\u4e00-\u9fff]{7})，([\u4e00-\u9fff]+)。")
POEMS = 6000
TEST = 300


def load(sources: Sources) -> Parts:
    archive = sources.npm("chinese-poetry", VERSION, SHA256)
    poems: list[list[Row]] = []
    seen: set[str] = set()
    for _, content in members(archive, "package/dist/quantangshi/poet.tang.", ".json"):
        for poem in json.loads(content):
            rows = [row for row in couplets("".join(poem["paragraphs"])) if row["问"] not in seen]
            seen.update(row["问"] for row in rows)
            if rows:
                poems.append(rows)
    poems.sort(key=lambda rows: rows[0]["问"])  # the order inside the archive says nothing
    return split(random.Random(SEED).sample(poems, min(POEMS, len(poems))), TEST)


def couplets(text: str) -> list[Row]:
    """Those in which every character is written alike in simplified Chinese: the package has traditional characters."""
    found = []
    for first, second in COUPLET.findall(text):
        if len(first) == len(second) and is_simplified(first + second):
            found.append({"问": first, "答": second})
    return found


def is_simplified(text: str) -> bool:
    """GB 2312 has the simplified characters and none that is only traditional."""
    try:
        text.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True
