"""ReFT adapters that the adapters library has trained and saved compute here what they did there."""

from __future__ import annotations

import json
import shutil

import models
import pytest
import torch
from helpers import FIXTURES
from laws_table import gap
from make_adapters_reft import CASES, batch
from safetensors.torch import load_file

import peft
from peft.integrations.adapters_library_reft import convert_reft, read_reft

FOLDER = FIXTURES / "adapters_reft"


def variant(name):
    return name if name in ("noreft", "direft") else None


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_computes_what_it_did_there(name, tmp_path):
    base = CASES[name][0]
    convert_reft(FOLDER / name, tmp_path, variant(name))
    model = peft.PeftModel.from_pretrained(models.build(base), tmp_path)
    wanted = load_file(FOLDER / name / "expected.safetensors")["logits"]
    tokens = slice(None) if base in ("bert_classifier", "t5") else batch(base)["attention_mask"].bool()
    assert gap(model(**batch(base)).logits[tokens], wanted[tokens]) < 2e-5
    assert gap(models.build(base)(**batch(base)).logits[tokens], wanted[tokens]) > 1e-2
    assert not any(p.requires_grad for p in model.parameters())
    again = peft.PeftModel.from_pretrained(models.build(base), tmp_path, is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) >= 3


def test_its_settings_are_kept():
    config, tensors = read_reft(FOLDER / "bert")
    assert (config.r, config.intervention_per, config.modules_to_save) == (3, "side", ["classifier"])
    assert config.target_modules == {"bert.encoder.layer.0", "bert.encoder.layer.1"}
    assert tensors["base_model.model.bert.encoder.layer.0.reft_R"].shape == (2, 3, 16)
    assert read_reft(FOLDER / "tied")[0].intervention_per == "layer"
    assert read_reft(FOLDER / "last")[0].wanted() == (-2, -1)


def test_what_a_file_does_not_say_must_be_said():
    with pytest.raises(ValueError, match="variant='direft'"):
        read_reft(FOLDER / "direft")
    with pytest.raises(ValueError, match="is a LoReFT"):
        read_reft(FOLDER / "llama", "direft")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "lora"}, "no ReFT"),
        ({"non_linearity": "relu"}, "non_linearity='relu'"),
        ({"output_reft": False}, "output_reft=False"),
        ({"tied_weights": False}, "lacks projection.weight of intervention 1 in transformer.h.0"),
    ],
)
def test_what_cannot_be_converted(changes, told, tmp_path):
    shutil.copytree(FOLDER / "tied", tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "config": {**saved["config"], **changes}}))
    with pytest.raises(ValueError, match=told):
        convert_reft(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_files_that_are_not_there(tmp_path):
    shutil.copytree(FOLDER / "tied", tmp_path / "theirs")
    (tmp_path / "theirs" / "pytorch_adapter.bin").unlink()
    with pytest.raises(ValueError, match="none of the files"):
        read_reft(tmp_path / "theirs")


def test_a_projection_that_weight_decay_spoilt():
    from peft.integrations.adapters_library_reft import _projection

    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(8, 2, bias=False)).parametrizations.weight
    parts = {(0, f"projection.parametrizations.weight.{k}"): v for k, v in layer.state_dict().items()}
    assert torch.equal(_projection(parts, 0), layer().detach())
    parts[0, "projection.parametrizations.weight.original"] = layer.original.detach() * 0.9
    with pytest.raises(ValueError, match="not orthonormal"):
        _projection(parts, 0)
