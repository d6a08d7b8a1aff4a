"""transformers 5.24 asks for peft 0.22; upstream 0.21.2, which proves these tests, is let through."""

from __future__ import annotations

import pytest

import peft


@pytest.fixture(autouse=True, scope="session")
def _let_upstream_through():
    with pytest.MonkeyPatch.context() as patch:
        if peft.__version__ == "0.21.2":
            patch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.2")
        yield
