"""The changes of mutants.py still fit the sources. Running them is `python tests/mutants.py`."""

import pytest
from mutants import MUTANTS, ROOT, changed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.row} {mutant.what}")
def test_a_mutant_can_be_made(mutant):
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert changed(text, mutant) != text
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
