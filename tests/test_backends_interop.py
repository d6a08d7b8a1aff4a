"""Adapters on torchao's and HQQ's layers, exchanged with upstream 0.21.2 in both directions: equal outputs."""

from __future__ import annotations

import subprocess

import make_backends
import make_bnb
import pytest
import torch
from helpers import FIXTURES, needs, offline, python, upstream_python
from safetensors.torch import load_file

import peft

NAMES = sorted(p.name for p in make_backends.FOLDER.iterdir())
pytestmark = pytest.mark.filterwarnings("ignore")


def needed(name):
    missing = needs(name.rpartition("-")[2], "transformers")
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"needs {missing}"))


def test_every_case_is_there():
    cases = {f"{case}-{storage}" for case in make_backends.CASES for storage in make_backends.STORAGES}
    assert cases - set(NAMES) == {"road-hqq"}  # which upstream does not support


@pytest.mark.parametrize("name", map(needed, NAMES))
def test_upstreams_files_give_equal_outputs(name):
    folder = make_backends.FOLDER / name
    model = peft.PeftModel.from_pretrained(make_backends.base(name.rpartition("-")[2]), folder)
    expected = load_file(folder / "expected.safetensors")["logits"]
    torch.testing.assert_close(make_bnb.logits(model), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_upstream_gives_equal_outputs_with_our_files(tmp_path):
    interpreter, env = upstream_python(), offline(PYTHONPATH="")
    missing = needs(*make_backends.STORAGES)
    if interpreter is None or missing:
        pytest.skip(f"no upstream environment, or no {missing}")
    if subprocess.run([interpreter, "-c", "import torchao, hqq"], env=env, capture_output=True, check=False).returncode:
        pytest.skip("the upstream environment has no torchao and hqq")
    make_bnb.make(peft, tmp_path, make_backends.STORAGES, make_backends.CASES, make_backends.base)
    for folder in tmp_path.iterdir():
        if folder.name not in NAMES:
            folder.rename(tmp_path.parent / folder.name)
    python(str(FIXTURES / "make_backends.py"), "read", str(tmp_path), interpreter=interpreter, env=env)
    for name in NAMES:
        found, wanted = (load_file(tmp_path / name / f"{w}.safetensors")["logits"] for w in ("read", "expected"))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
