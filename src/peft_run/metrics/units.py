"""What overlap measures count: single characters of Chinese and Japanese, whole words of everything else."""

from __future__ import annotations

import importlib.util
import re
import unicodedata

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
UNIT = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’][^\W_{CJK}]+)*|[^\w\s]|_")
RUN = re.compile(rf"[{CJK}]+|[^{CJK}]+")
IS_CJK = re.compile(f"[{CJK}]")


def characters(text: str, *, fold: bool = False) -> list[str]:
    """你好 world! -> 你 好 world !; with `fold`, in lower case, full-width letters as plain ones, no punctuation."""
    if not fold:
        return UNIT.findall(text)
    return [unit for unit in UNIT.findall(unicodedata.normalize("NFKC", text).casefold()) if unit[0].isalnum()]


def words(text: str, *, fold: bool = False) -> list[str]:
    """As `characters`, with Chinese split into words by jieba. Only where `has_words()`."""
    import jieba

    jieba.setLogLevel("ERROR")
    text = unicodedata.normalize("NFKC", text).casefold() if fold else text
    found: list[str] = []
    for run in RUN.findall(text):
        found += jieba.lcut(run) if IS_CJK.match(run) else characters(run, fold=fold)
    return found


def has_words() -> bool:
    """Whether Chinese can be split into words here."""
    return importlib.util.find_spec("jieba") is not None


def has_cjk(text: str) -> bool:
    return IS_CJK.search(text) is not None
