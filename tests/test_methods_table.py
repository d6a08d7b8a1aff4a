"""`peft methods` and docs/methods.md come from the registry, and are complete."""

from __future__ import annotations

from helpers import ROOT

from peft import registry
from peft_run.cli import main
from peft_run.method_notes import NOTES
from peft_run.methods import markdown


def test_the_document_is_what_the_registry_says():
    assert (ROOT / "docs" / "methods.md").read_text() == markdown()


def test_every_method_has_its_note():
    assert set(NOTES) == registry.names()


def test_the_command_lists_and_explains(capsys):
    assert main(["methods"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == registry.names()
    assert main(["methods", "vera"]) == 0
    assert "2310.11454" in capsys.readouterr().out
    assert main(["methods", "verra"]) == 2
