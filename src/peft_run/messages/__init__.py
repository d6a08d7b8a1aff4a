"""Every sentence the commands say to people, in both languages: one file a topic, found by the first part of the key.

`"train.saved"` is the entry of that name in `messages/train.py`; its TABLE maps keys to {"en": ..., "zh": ...}.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable

LANGUAGES = ("en", "zh")
KEY = re.compile(r"([a-z_]+)\.[a-z0-9_]+")


def sentence(key: str, language: str, /, **values: object) -> str:
    """The sentence of `key`, filled in. What is no key is a sentence already and comes back as it is."""
    topic = KEY.fullmatch(key)
    if topic is None:
        return key
    table = importlib.import_module(f"peft_run.messages.{topic[1]}").TABLE
    return table[key][language].format(**values)


class Say:
    """`say("demo.data", train=900, held_out=100)` tells it, `say.text(...)` gives the sentence back."""

    def __init__(self, language: str, tell: Callable[[str], None]) -> None:
        self.language = language
        self.tell = tell

    def text(self, key: str, /, **values: object) -> str:
        return sentence(key, self.language, **values)

    def __call__(self, key: str, /, **values: object) -> None:
        self.tell(self.text(key, **values))


def default_language() -> str:
    """Chinese where the locale of the terminal is, in the order in which POSIX reads these variables."""
    locale = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if locale.startswith("zh") else "en"
