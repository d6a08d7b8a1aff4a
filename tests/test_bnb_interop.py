"""Adapters on bitsandbytes layers, exchanged with upstream 0.21.2 in both directions: equal outputs."""

from __future__ import annotations

import make_bnb
import pytest
import torch
from helpers import FIXTURES, needs, offline, python, upstream_python

import peft

pytestmark = pytest.mark.skipif(bool(needs("bitsandbytes", "transformers")), reason="needs bitsandbytes")
NAMES = sorted(p.name for p in make_bnb.FOLDER.iterdir())


def expected(folder, name="expected"):
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")["logits"]


def test_every_case_is_there():
    assert sorted(f"{case}-{storage}" for case in make_bnb.CASES for storage in make_bnb.STORAGES) == NAMES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_upstreams_files_give_equal_outputs(name):
    folder = make_bnb.FOLDER / name
    model = peft.PeftModel.from_pretrained(make_bnb.base(name.rpartition("-")[2]), folder)
    torch.testing.assert_close(make_bnb.logits(model), expected(folder), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_upstream_gives_equal_outputs_with_our_files(tmp_path):
    if (interpreter := upstream_python()) is None:
        pytest.skip("no upstream environment: set PEFT_UPSTREAM_PYTHON or make benchmarks/.venv-upstream")
    make_bnb.make(peft, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES
    script = FIXTURES / "make_bnb.py"
    python(str(script), "read", str(tmp_path), interpreter=interpreter, env=offline(PYTHONPATH=""))
    for name in NAMES:
        found, wanted = (expected(tmp_path / name, which) for which in ("read", "expected"))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
