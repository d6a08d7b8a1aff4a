"""LoftQ: a quantized base weight, and factors that start as what quantizing took away."""

from __future__ import annotations

import models
import pytest
import torch
from helpers import FIXTURES, needs
from storages import STORAGES, quantized
from torch import nn

import peft
from peft.errors import AdapterError, CheckpointError, ConfigError, PeftWarning
from peft.methods.lora import loftq

pytestmark = pytest.mark.skipif(bool(needs("bitsandbytes", "transformers")), reason="needs bitsandbytes")
NF4 = next(s for s in STORAGES if s.name == "nf4")
IDS = torch.arange(16).view(2, 8)


def config(bits=4, steps=1, **more):
    more = {"r": 4, "lora_alpha": 4, "target_modules": ["0"], **more}
    settings = peft.LoftQConfig(loftq_bits=bits, loftq_iter=steps)
    return peft.LoraConfig(init_lora_weights="loftq", loftq_config=settings, **more)


def base(rows=32, columns=64):
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = models.noise((rows, columns), 3)
    return nn.Sequential(layer)


def nf4(W):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(W, quant_type="nf4", compress_statistics=False))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("steps", [1, 3])
def test_values_are_upstreams(bits, steps):
    from safetensors.torch import load_file

    wanted = load_file(FIXTURES / "loftq" / "expected.safetensors")
    layer = peft.get_peft_model(base(), config(bits, steps)).base_model.layers["0"]
    torch.testing.assert_close(layer.weight.data, wanted[f"{bits}.{steps}.Q"], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.get_delta_weight("default"), wanted[f"{bits}.{steps}.BA"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("alpha", "rslora"), [(4, False), (8, False), (16, True)])
def test_the_update_is_the_nearest_one_whatever_the_scaling(alpha, rslora):
    W = base()[0].weight.data
    layer = peft.get_peft_model(base(), config(lora_alpha=alpha, use_rslora=rslora)).base_model.layers["0"]
    Q = layer.weight.data
    assert torch.equal(Q, nf4(W))
    U, S, Vh = torch.linalg.svd((W - Q).double())
    wanted = (U[:, :4] * S[:4]) @ Vh[:4]
    assert (layer.get_delta_weight("default") - wanted).abs().max() < 1e-6
    torch.testing.assert_close(*(m["default"].weight.norm() for m in (layer.lora_A, layer.lora_B)))


def test_steps_bring_it_nearer():
    W, errors = base()[0].weight.data, []
    for steps in (1, 2, 5):
        layer = peft.get_peft_model(base(), config(steps=steps)).base_model.layers["0"]
        errors.append(float((layer.weight + layer.get_delta_weight("default") - W).norm()))
    assert errors[2] < errors[1] < errors[0] < 0.95 * float((nf4(W) - W).norm())


def test_embeddings_and_odd_widths():
    emb = models.fill(models.Embedded())
    W = emb.emb.weight.data.clone()
    layer = peft.get_peft_model(emb, config(target_modules=["emb", "lin"])).base_model.layers["emb"]
    error = (layer.weight + layer.get_delta_weight("default") - W).norm()
    assert error < 0.9 * (layer.weight - W).norm()
    assert 0 < (layer.weight - W).norm() < 0.15 * W.norm()


def test_saved_and_loaded_on_either_base(tmp_path):
    model = peft.get_peft_model(base(), config(steps=2))
    x = models.noise((3, 64), 5)
    with torch.no_grad():
        model.base_model.layers["0"].lora_B["default"].weight += 0.1
        wanted = model(x)
    model.save_pretrained(tmp_path)
    of_original = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(of_original(x), wanted)
    Q = base()
    Q[0].weight.data = model.base_model.layers["0"].weight.data.clone()
    again = peft.PeftModel.from_pretrained(Q, tmp_path)
    torch.testing.assert_close(again(x), wanted, rtol=0, atol=1e-6)


def test_a_base_that_was_quantized_before():
    with pytest.warns(PeftWarning, match="replace_lora_weights_loftq"):
        layer = peft.get_peft_model(quantized(base(), NF4), config()).base_model.layers["0"]
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()


def test_settings_are_checked():
    for wrong in ({"loftq_bits": 3}, {"loftq_iter": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            peft.LoftQConfig(**wrong)
    with pytest.raises(ConfigError, match="loftq_config"):
        peft.LoraConfig(init_lora_weights="loftq")
    assert config().to_dict()["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    with pytest.raises(ConfigError, match="linear layers and embeddings"):
        peft.get_peft_model(models.Parameters(), config(target_modules=[], target_parameters=["experts.w1"]))


# -- replace_lora_weights_loftq -------------------------------------------------------------------------------------
def llama():
    return models.llama(hidden_size=64, intermediate_size=128, head_dim=16)


def four_bit_llama(folder, r=16, **more):
    llama().save_pretrained(folder, **more)
    model = llama()
    head, model.lm_head = model.lm_head, nn.Identity()
    model = quantized(model, NF4)
    model.lm_head = head
    model.config._name_or_path = str(folder)
    config = peft.LoraConfig(r=r, lora_alpha=64, target_modules="all-linear")
    return peft.get_peft_model(model, config).eval()


def distance(model):
    """From the float model's logits, computed exactly."""
    with torch.no_grad():
        return float((model.train()(input_ids=IDS).logits - llama()(input_ids=IDS).logits).norm())


@pytest.mark.parametrize("source", ["config", "folder", "file", "shards"])
def test_a_quantized_model_comes_nearer_to_its_original(source, tmp_path):
    model = four_bit_llama(tmp_path, max_shard_size="40KB" if source == "shards" else "1GB")
    before = distance(model)
    path = {"config": None, "file": tmp_path / "model.safetensors"}.get(source, tmp_path)
    peft.replace_lora_weights_loftq(model, path)
    assert distance(model) < 0.8 * before
    original = llama().get_submodule("model.layers.1.mlp.down_proj").weight
    layer = model.base_model.layers["model.layers.1.mlp.down_proj"]
    U, S, Vh = torch.linalg.svd((original - layer.base_weight()).double())
    assert (layer.get_delta_weight("default") - (U[:, :16] * S[:16]) @ Vh[:16]).abs().max() < 1e-5


@pytest.mark.parametrize("with_inputs", [False, True])
def test_ranks_beyond_those_of_the_weight_start_as_usual(with_inputs, tmp_path):
    model = four_bit_llama(tmp_path, r=96)
    layer = model.base_model.layers["model.layers.0.self_attn.k_proj"]
    assert layer.shape == (32, 64)
    A = layer.lora_A["default"].weight.clone()
    peft.replace_lora_weights_loftq(model, run_model=runs(model) if with_inputs else None)
    assert torch.equal(layer.lora_A["default"].weight[32:], A[32:])
    assert not layer.lora_B["default"].weight[:, 32:].any()
    original = llama().get_submodule("model.layers.0.self_attn.k_proj").weight
    torch.testing.assert_close(layer.base_weight() + layer.get_delta_weight("default"), original, rtol=0, atol=1e-5)


def test_the_callback_decides(tmp_path):
    model, asked = four_bit_llama(tmp_path), []

    def keep_first(found, name):
        assert found is model
        asked.append(name)
        return len(asked) == 1

    peft.replace_lora_weights_loftq(model, callback=keep_first)
    assert len(asked) == 14 and asked[0].startswith("model.layers.")
    assert sum(bool(layer.get_delta_weight("default").any()) for layer in model.base_model.layers.values()) == 1


def test_wrong_uses(tmp_path):
    model = four_bit_llama(tmp_path)
    with pytest.raises(AdapterError, match="nothing to replace"):
        peft.replace_lora_weights_loftq(model, adapter_name="other")
    with pytest.raises(AdapterError, match="nothing to replace"):
        peft.replace_lora_weights_loftq(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])))
    models.gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="lacks"):
        peft.replace_lora_weights_loftq(model, tmp_path / "other")


# -- with sample inputs ---------------------------------------------------------------------------------------------
def runs(model, ids=None):
    """A function that runs the model over sample texts."""
    ids = torch.arange(64).view(4, 16) if ids is None else ids
    return lambda: model(input_ids=ids)


def inputs_of(model, path, ids):
    """What the layer at `path` gets, (tokens, in)."""
    seen = []
    layer = model.base_model.layers[path]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


def test_with_inputs_the_outputs_for_them_come_nearest(tmp_path):
    ids, path = torch.arange(64).view(4, 16), "model.layers.1.mlp.down_proj"
    model = four_bit_llama(tmp_path)
    X = inputs_of(model, path, ids).double()
    W = llama().get_submodule(path).weight.double()
    layer = model.base_model.layers[path]
    residual = (W - layer.base_weight()).detach()

    def lost():  # of the outputs, for these inputs
        return float((X @ (residual - layer.get_delta_weight("default")).T).norm().detach())

    nothing = lost()
    peft.replace_lora_weights_loftq(model)
    of_weights = lost()
    peft.replace_lora_weights_loftq(four_bit := four_bit_llama(tmp_path), run_model=runs(four_bit, ids))
    layer = four_bit.base_model.layers[path]
    singular = torch.linalg.svdvals(X @ residual.T)
    least = float(singular[16:].norm())  # no matrix of rank 16 leaves less (Eckart and Young)
    assert lost() == pytest.approx(least, rel=1e-4)
    assert least < 0.95 * of_weights < 0.95 * nothing
    A, B = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    hooks = [len(m.base_model.layers[path]._forward_pre_hooks) for m in (model, four_bit)]
    assert hooks[0] == hooks[1]  # none is left behind


def test_the_inputs_are_looked_at_part_by_part_where_memory_is_small(tmp_path, monkeypatch):
    calls, deltas = [], []
    for bound in (2**28, 64 * 64 * 4 * 7):
        monkeypatch.setattr(loftq, "MOMENTS", bound)
        model = four_bit_llama(tmp_path)
        calls.append(0)

        def run(model=model):
            calls[-1] += 1
            model(input_ids=IDS)

        peft.replace_lora_weights_loftq(model, run_model=run)
        deltas.append(model.base_model.layers["model.layers.0.self_attn.q_proj"].get_delta_weight("default"))
    assert calls[0] == 1 and calls[1] > 2
    torch.testing.assert_close(*deltas)


def test_what_fails_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loftq, "MOMENTS", 1)  # every layer by itself: the first ones are done when a later one fails
    model = four_bit_llama(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    last = model.get_base_model().model.layers[1].mlp

    def unchanged():
        return all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "lora_" in k)

    with pytest.raises(ConfigError, match="did not run the layers"):
        peft.replace_lora_weights_loftq(model, run_model=lambda: None)
    handle = last.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
    with pytest.raises(ConfigError, match=r"mlp.gate_proj.*not finite"):
        peft.replace_lora_weights_loftq(model, run_model=runs(model))
    handle.remove()
    assert unchanged()
    models.llama(hidden_size=64, intermediate_size=192, head_dim=16).save_pretrained(tmp_path / "wider")
    for run_model in (None, runs(model)):
        with pytest.raises(CheckpointError, match=r"gate_proj.*64 inputs and 192 outputs.*64 and 128"):
            peft.replace_lora_weights_loftq(model, tmp_path / "wider", run_model=run_model)
        assert unchanged()
    with pytest.raises(ZeroDivisionError):
        peft.replace_lora_weights_loftq(model, callback=lambda found, name: 1 // ("down_proj" not in name))
    assert unchanged()
