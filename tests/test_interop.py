"""Adapters exchanged with upstream 0.21.2, in both directions: same keys, same outputs."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import cases
import models
import pytest
import torch
from helpers import FIXTURES, needs, offline, python, upstream_python
from safetensors import safe_open
from safetensors.torch import load_file

import peft

UPSTREAM = FIXTURES / "upstream"


def named(chosen):
    """The cases' names, as parameters; skipped where a library is missing."""
    return [
        pytest.param(c.name, marks=pytest.mark.skipif(bool(c.needs and needs(c.needs)), reason=f"needs {c.needs}"))
        for c in chosen
    ]


NAMES = named(cases.CASES)

# Upstream applies the out_proj delta of nn.MultiheadAttention twice; ours does so for upstream's files only.
DOUBLED = {"mha"}


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Dtype and shape of every key."""
    return {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}


def read_config(folder: Path) -> dict:
    """adapter_config.json without the version, lists of names as sorted sets (upstream repeats names of heads)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_version")
    strings = {k for k, v in config.items() if isinstance(v, list) and v and all(isinstance(x, str) for x in v)}
    return {k: sorted(set(v)) if k in strings else v for k, v in config.items()}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], case: cases.Case) -> None:
    """Every output within the tolerance of the case."""
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=case.tolerance, rtol=case.tolerance, msg=name)


@functools.cache
def ours(name: str) -> torch.nn.Module:
    """The upstream fixture, loaded by the package under test; tests only read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cases.load(peft, cases.BY_NAME[name], UPSTREAM / name)


@pytest.mark.parametrize("name", NAMES)
def test_loads_upstream_file_with_equal_outputs(name):
    case = cases.BY_NAME[name]
    expected = load_file(UPSTREAM / name / "expected.safetensors")
    model = ours(name)
    for key, value in models.inputs(case.base).items():
        assert torch.equal(value, expected[f"input.{key}"])
    close(cases.outputs(model, case), {k: v for k, v in expected.items() if k.startswith("output")}, case)


@pytest.mark.parametrize("name", NAMES)
def test_saves_again_what_it_loaded(name, tmp_path):
    case = cases.BY_NAME[name]
    ours(name).save_pretrained(str(tmp_path), **case.save)
    for sub in ["", "second"] if case.second else [""]:
        wanted, found = cases.tensors(UPSTREAM / name / sub), cases.tensors(tmp_path / sub)
        assert layout(found) == layout(wanted)
        for key, value in wanted.items():
            if case.exact or not value.is_floating_point():
                assert torch.equal(found[key], value), key
            else:
                torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=key)
        assert read_config(tmp_path / sub) == read_config(UPSTREAM / name / sub)
    expected = load_file(UPSTREAM / name / "expected.safetensors")
    again = cases.outputs(cases.load(peft, case, tmp_path), case)
    close(again, {k: v for k, v in expected.items() if k.startswith("output")}, case)


# Upstream gives tied LoRA layers separate parameters over shared memory; ours are one pair, trained once.
ONE_PAIR = {"tying_target"}


@pytest.mark.parametrize("name", named(c for c in cases.CASES if c.name not in ONE_PAIR and c.names))
def test_trains_the_same_parameters_in_the_same_order(name):
    with safe_open(UPSTREAM / name / "expected.safetensors", "pt") as file:
        wanted = file.metadata()["trainable"].split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cases.create(peft, cases.BY_NAME[name])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == wanted


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Every case made here, then loaded, run and saved again by upstream in a subprocess."""
    interpreter = upstream_python()
    if interpreter is None:
        pytest.skip("no upstream environment: set PEFT_UPSTREAM_PYTHON or make benchmarks/.venv-upstream")
    made, served = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("served")
    outputs, errors = {}, {}
    for case in cases.CASES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = cases.create(peft, case)
                model.save_pretrained(str(made / case.name), **case.save)
                # A base that the initialisation moved is rebuilt by whoever loads: compare loaded with loaded.
                outputs[case.name] = cases.outputs(cases.load(peft, case, made / case.name), case)
        except Exception as error:  # reported by the test of that case
            errors[case.name] = error
    env = offline()
    env.pop("PYTHONPATH", None)
    python(str(FIXTURES / "cases.py"), str(made), str(served), interpreter=interpreter, env=env, timeout=600)
    return made, served, outputs, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_upstream_loads_our_file_with_equal_outputs(name, exchanged):
    made, served, outputs, errors = exchanged
    case = cases.BY_NAME[name]
    if name in errors:
        raise errors[name]
    if case.served:
        pytest.skip(case.served)
    error = served / name / "error.txt"
    told = error.read_text() if error.exists() else ""
    if case.needs and f"No module named '{case.needs}'" in told:
        pytest.skip(f"the upstream environment lacks {case.needs}")
    assert not told, told
    if name not in DOUBLED or peft.__version__.startswith("0."):
        close(load_file(served / name / "outputs.safetensors"), outputs[name], case)
    for sub in ["", "second"] if case.second else [""]:
        assert layout(cases.tensors(made / name / sub)) == layout(cases.tensors(served / name / sub))
        assert layout(cases.tensors(made / name / sub)) == layout(cases.tensors(UPSTREAM / name / sub))
        config, wanted = read_config(made / name / sub), read_config(UPSTREAM / name / sub)
        assert set(config) == set(wanted)
        # The same modules can be named in several ways; the keys above prove that they are the same.
        named = {"target_modules", "modules_to_save"}
        assert {k: v for k, v in config.items() if k not in named} == {
            k: v for k, v in wanted.items() if k not in named
        }


def test_attention_delta_counts_once_unless_upstream_wrote_the_file():
    """A hand-merged base tells the two readings of the same tensors apart."""
    if peft.__version__.startswith("0."):
        pytest.skip("upstream counts the out_proj delta twice")
    case = cases.BY_NAME["mha"]
    model = cases.create(peft, case)
    tensors = peft.get_peft_model_state_dict(model)
    base, scale = models.build(case.base), case.config["lora_alpha"] / case.config["r"]
    with torch.no_grad():
        for target, key in [
            (base.mha.in_proj_weight, "mha"),
            (base.mha.out_proj.weight, "mha.base_layer.out_proj"),
            (base.head.weight, "head"),
        ]:
            a, b = (tensors[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
            target += scale * b @ a
    torch.testing.assert_close(models.run(model, case.base), models.run(base, case.base), atol=1e-5, rtol=1e-5)


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in UPSTREAM.rglob("*") if path.is_file()) < 4_000_000
