"""Every sentence is there in every language, with the same values to fill in."""

from __future__ import annotations

import importlib
import pkgutil
from string import Formatter

import pytest

from peft_run import messages
from peft_run.messages import LANGUAGES

TOPICS = sorted(module.name for module in pkgutil.iter_modules(messages.__path__))


@pytest.mark.parametrize("topic", TOPICS)
def test_sentences_are_there_in_every_language(topic):
    table = importlib.import_module(f"peft_run.messages.{topic}").TABLE
    for key, texts in table.items():
        assert key.startswith(f"{topic}.") and set(texts) == set(LANGUAGES), key
        values = [{name for _, name, _, _ in Formatter().parse(text) if name} for text in texts.values()]
        assert values[0] == values[1], key
