"""Adapters that the `adapters` library saved (tests/fixtures/make_adapters_lib.py) give here what they gave there."""

from __future__ import annotations

import json
import shutil

import adapters_lib
import pytest
import torch
from helpers import FIXTURES
from safetensors.torch import load_file, save_file

import peft
from peft.errors import AdapterError, CheckpointError, PeftWarning
from peft.integrations.adapters_library import load_adapters_checkpoint

FILES = FIXTURES / "adapters_lib"
UNABLE = adapters_lib.UNABLE


def expected(architecture, name):
    return load_file(FILES / architecture / "expected.safetensors")[name]


def changed(folder, tmp_path, **settings):
    """A copy of an adapter's folder with other settings."""
    shutil.copytree(FILES / folder, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_config.json"
    data = json.loads(path.read_text())
    data["config"].update(settings)
    path.write_text(json.dumps(data))
    return tmp_path / "copy"


@pytest.mark.parametrize(("architecture", "name"), [k for k in adapters_lib.KEPT if k not in UNABLE])
def test_same_outputs(architecture, name):
    base = adapters_lib.make_base(architecture)
    plain = adapters_lib.run(base, architecture)
    model = load_adapters_checkpoint(base, FILES / architecture / name)
    wanted = expected(architecture, name)
    assert (wanted - plain).abs().max() > 0.02  # the adapter does something
    torch.testing.assert_close(adapters_lib.run(model, architecture), wanted, rtol=2e-6, atol=4e-6)


def test_what_cannot_be_placed_is_refused():
    base = adapters_lib.make_base("bert")
    before = [n for n, _ in base.named_modules()]
    with pytest.raises(CheckpointError, match="adapter_residual_before_ln"):
        load_adapters_checkpoint(base, FILES / "bert" / "seq_bn_norm_of_sum")
    assert [n for n, _ in base.named_modules()] == before


@torch.no_grad()
def test_saves_as_one_of_ours(tmp_path):
    model = load_adapters_checkpoint(adapters_lib.make_base("llama"), FILES / "llama" / "seq_bn_attention")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(adapters_lib.make_base("llama"), tmp_path)
    assert torch.equal(adapters_lib.run(again, "llama"), adapters_lib.run(model, "llama"))


def test_in_a_model_with_a_head():
    """The file calls the modules as BertModel does; here they lie below `bert`."""
    from transformers import BertForSequenceClassification

    whole = BertForSequenceClassification(adapters_lib.make_base("bert").config)
    whole.bert.load_state_dict(adapters_lib.make_base("bert").state_dict())
    model = load_adapters_checkpoint(whole.eval(), FILES / "bert" / "seq_bn_inv")
    found = adapters_lib.run(model.get_base_model().bert, "bert")
    torch.testing.assert_close(found, expected("bert", "seq_bn_inv"), rtol=2e-6, atol=4e-6)


@torch.no_grad()
def test_two_of_them_in_one_model_switch_and_share_a_batch():
    model = load_adapters_checkpoint(adapters_lib.make_base("gpt2"), FILES / "gpt2" / "par_bn", "first")
    load_adapters_checkpoint(model, FILES / "gpt2" / "seq_bn", "second")
    with pytest.raises(AdapterError, match="second"):
        load_adapters_checkpoint(model, FILES / "gpt2" / "seq_bn", "second")
    first, second = expected("gpt2", "par_bn"), expected("gpt2", "seq_bn")
    torch.testing.assert_close(adapters_lib.run(model, "gpt2"), first, rtol=2e-6, atol=4e-6)
    ids = torch.tensor([[1, 5, 9, 31, 12, 6, 8], [1, 17, 3, 3, 30, 22, 10]])
    both = model(input_ids=ids, adapter_names=["second", "first"]).logits
    torch.testing.assert_close(both, torch.stack([second[0], first[1]]), rtol=2e-6, atol=4e-6)
    model.set_adapter("second")
    torch.testing.assert_close(adapters_lib.run(model, "gpt2"), second, rtol=2e-6, atol=4e-6)


def test_loaded_for_training():
    model = load_adapters_checkpoint(adapters_lib.make_base("t5"), FILES / "t5" / "scaled_par_bn", is_trainable=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("bottleneck_" in n for n in trained)
    frozen = load_adapters_checkpoint(adapters_lib.make_base("t5"), FILES / "t5" / "scaled_par_bn")
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stochastic_depth": 0.1}, "stochastic_depth"),
        ({"inv_adapter": "glow"}, "inv_adapter"),
        ({"non_linearity": "laplace"}, "non_linearity"),
        ({"original_ln_after": False}, "residual_before_ln"),
        ({"original_ln_before": False, "original_ln_after": False}, "original_ln_after"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln"),
        ({"rotary_adapter": True}, "rotary_adapter"),
        ({"architecture": "lora"}, "lora"),
        ({"phm_layer": True, "shared_phm_rule": True}, "shared_phm_rule"),
    ],
)
def test_settings_without_an_equal_are_named(settings, says, tmp_path):
    base = adapters_lib.make_base("bert")
    with pytest.raises(CheckpointError, match=says):
        load_adapters_checkpoint(base, changed("bert/seq_bn", tmp_path, **settings))
    assert not hasattr(base, "peft_config") and all(p.requires_grad for p in base.parameters())


def test_the_wrong_model_is_refused():
    with pytest.raises(CheckpointError, match="is the place of the tensor"):
        load_adapters_checkpoint(adapters_lib.make_base("llama"), FILES / "bert" / "seq_bn")
    with pytest.raises(CheckpointError, match="is the place of the tensor"):
        load_adapters_checkpoint(adapters_lib.make_base("bert", layers=1), FILES / "bert" / "seq_bn")
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_adapters_checkpoint(adapters_lib.make_base("bert", width=16), FILES / "bert" / "double_seq_bn")
    with pytest.raises(CheckpointError, match="model_type is None"):
        load_adapters_checkpoint(torch.nn.Linear(2, 2), FILES / "bert" / "seq_bn")


@torch.no_grad()
def test_shared_rules_are_read_where_the_file_has_them(tmp_path):
    """The library leaves them out of its files; with its `shared_parameters` added they count."""
    folder = changed("bert/compacter", tmp_path, shared_phm_rule=True)
    tensors = load_file(folder / "adapter.safetensors")
    rules = [k for k in tensors if k.endswith("phm_rule")]
    one = tensors[rules[0]]
    save_file({k: one.clone() if k in rules else v for k, v in tensors.items()}, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text((FILES / "bert" / "compacter" / "adapter_config.json").read_text())
    wanted = adapters_lib.run(load_adapters_checkpoint(adapters_lib.make_base("bert"), folder), "bert")
    kept = {k: v for k, v in tensors.items() if k not in rules}
    folder = changed("bert/compacter", tmp_path / "shared", shared_phm_rule=True)
    save_file({**kept, "shared_parameters.one.phm_rule": one}, folder / "adapter.safetensors")
    model = load_adapters_checkpoint(adapters_lib.make_base("bert"), folder)
    assert list(model.base_model.shared) == ["bottleneck_rule"]
    assert torch.equal(adapters_lib.run(model, "bert"), wanted)


def test_a_head_in_the_folder_is_mentioned(tmp_path):
    folder = changed("llama/seq_bn", tmp_path)
    base = adapters_lib.make_base("llama")
    save_file({"lm_head.weight": base.lm_head.weight.detach().clone()}, folder / "model_head.safetensors")
    load_adapters_checkpoint(base, folder)  # the model's own: nothing to say
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "model_head.safetensors")
    with pytest.warns(PeftWarning, match="lm_head.weight"):
        load_adapters_checkpoint(adapters_lib.make_base("llama"), folder)


def test_from_pretrained_says_where_to_turn():
    with pytest.raises(ValueError, match="load_adapters_checkpoint"):
        peft.PeftModel.from_pretrained(adapters_lib.make_base("bert"), FILES / "bert" / "seq_bn")
