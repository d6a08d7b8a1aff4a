"""Chinese descriptions of Debian's packages, each with the one-line synopsis that its translators gave it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft_run.corpora.parts import Parts, Row, split
from peft_run.corpora.sources import Sources

SOURCE = "Debian: Translation-zh_CN of this machine's release, main"
LICENCE = "free, each description under the licence of its package (Debian Description Translation Project)"
ABOUT = {"en": "Chinese package descriptions and their one-line synopses", "zh": "中文软件包说明及其一句话简介"}

CHINESE = re.compile(r"[\u4e00-\u9fff]")
SHORTEST, LONGEST = 24, 400  # characters of a description
TEST = 160


def load(sources: Sources) -> Parts:
    text = sources.translations("zh_CN").read_text(encoding="utf-8")
    groups: dict[str, list[Row]] = {}  # packages of one source share sentences: they stay together
    for body, synopsis in pairs(text):
        groups.setdefault(body[:30], []).append({"正文": body, "摘要": synopsis})
    return split(list(groups.values()), TEST)


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """(description, synopsis) of the entries that are in Chinese and of a fair length."""
    for entry in text.split("\n\n"):
        _, found, told = entry.partition("Description-zh_CN: ")
        if not found:
            continue
        synopsis, *lines = told.splitlines()
        body = " ".join(line.strip() for line in lines if line.strip() != ".")
        body = re.sub(r"(?<=[\u4e00-\u9fff，。；：、]) (?=[\u4e00-\u9fff])", "", body)  # line ends inside a sentence
        synopsis = synopsis.strip()
        if SHORTEST <= len(body) <= LONGEST and 4 <= len(synopsis) <= 40 and chinese(body) and chinese(synopsis):
            yield body, synopsis


def chinese(text: str) -> bool:
    return len(CHINESE.findall(text)) >= 0.3 * len(text)
