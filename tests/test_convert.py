"""Adapters converted to LoRA: what the file holds computes what the adapter did."""

from __future__ import annotations

import json

import models
import pytest
import torch
from laws_table import EXAMPLES, gap, quiet, wrapped

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.errors import PeftWarning
from peft.methods.lora.convert import convert_to_lora, save_as_lora

# Methods whose update of a linear layer is a weight that does not depend on the input or on the base layer's state.
CONVERTIBLE = {
    "C3A",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "PSOFT",
    "RANDLORA",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}
UNFIT = ("alora", "kasa")  # LoRA that acts on some tokens only, or that changes the base


def adapted(base: str = "llama", name: str = "default", **config) -> PeftModel:
    torch.manual_seed(0)
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, **config}
    model = get_peft_model(models.build(base), LoraConfig(**config), adapter_name=name)
    models.perturb(model, scale=0.3)
    return model.eval()


def reloaded(base: str, path) -> torch.Tensor:
    return models.run(PeftModel.from_pretrained(models.build(base), path), base)


@pytest.mark.parametrize(
    ("base", "config", "rank"),
    [
        ("llama", {"use_dora": True}, 1.0),
        ("llama", {"init_lora_weights": "pissa"}, 8),
        ("llama", {"init_lora_weights": "olora"}, 0.9999999),
        ("llama_classifier", {"use_dora": True, "modules_to_save": ["score"]}, 1.0),
        ("llama", {"use_dora": True, "trainable_token_indices": [3, 5]}, 1.0),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, 16),
    ],
)
def test_the_file_computes_what_the_adapter_did(base, config, rank, tmp_path):
    model = adapted(base, **config)
    save_as_lora(tmp_path, model, rank)
    torch.testing.assert_close(reloaded(base, tmp_path), models.run(model, base), atol=1e-4, rtol=1e-4)


def test_plain_lora_warns_and_keeps_its_bias(tmp_path):
    model = adapted("llama_bias", use_rslora=True, lora_bias=True, lora_alpha=3)
    with pytest.warns(PeftWarning, match="plain LoRA already"):
        save_as_lora(tmp_path, model, 4)
    torch.testing.assert_close(reloaded("llama_bias", tmp_path), models.run(model, "llama_bias"))


def test_an_int_rank_is_the_nearest_update_of_that_rank():
    model = adapted(use_dora=True)
    config, tensors = convert_to_lora(model, 3)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.use_dora) == (3, 3, {}, False)
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    delta = layer.adapters["default"].delta(layer.base_weight())
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    A, B = tensors[key.format("A")], tensors[key.format("B")]
    rest = torch.linalg.svdvals(delta)[3:]
    assert (delta - B @ A).norm().item() == pytest.approx(rest.norm().item(), rel=1e-3)
    torch.testing.assert_close(A.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("part", [0.3, 0.8, 0.99])
def test_a_float_rank_keeps_that_part_of_the_energy(part):
    model = adapted(use_dora=True)
    config, _ = convert_to_lora(model, part)
    assert (config.r, config.lora_alpha) == (1, 1)
    assert config.rank_pattern == config.alpha_pattern
    for path, layer in model.base_model.layers.items():
        energy = torch.linalg.svdvals(layer.adapters["default"].delta(layer.base_weight())).square()
        kept = config.rank_pattern[path]
        assert energy[:kept].sum() >= part * energy.sum() > energy[: kept - 1].sum()


def test_an_adapter_that_does_nothing_gets_rank_one():
    model = get_peft_model(models.build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(PeftWarning, match="plain LoRA already"):
        config, tensors = convert_to_lora(model, 0.5)
    assert set(config.rank_pattern.values()) == {1}
    assert all(t.isfinite().all() for t in tensors.values())


def test_names_that_are_endings_of_others_stay_apart(tmp_path):
    """`lin` would also match `inner.lin`, which is not converted."""

    def base():
        inner = torch.nn.ModuleDict({"lin": torch.nn.Linear(16, 16)})
        model = torch.nn.ModuleDict({"lin": torch.nn.Linear(16, 16), "inner": inner})
        model.forward = lambda x: model["inner"]["lin"](model["lin"](x))
        return models.fill(model)

    model = get_peft_model(base(), LoraConfig(target_modules="lin", use_dora=True))
    models.perturb(model, scale=0.3)
    save_as_lora(tmp_path, model, 0.999)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert list(loaded.base_model.layers) == ["lin"]


def test_states_and_names_do_not_matter(tmp_path):
    """Merged, inactive, under another name, or injected without a PeftModel: the result is the same."""
    want = convert_to_lora(adapted(use_dora=True), 4)[1]
    model = adapted(name="mine", use_dora=True)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter(["mine"])
    got = convert_to_lora(model, 4, adapter_name="mine", progressbar=False, compile_kwargs={"backend": "eager"})[1]
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key].abs(), want[key].abs())
    bare = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], use_dora=True), models.build("llama"))
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in convert_to_lora(bare, 4)[1]


def test_files_are_written_as_usual(tmp_path):
    save_as_lora(tmp_path, adapted(use_dora=True, task_type="CAUSAL_LM"), 4)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 4)


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "must not be 0"),
        (-1, ValueError, "at least 1"),
        (1.5, ValueError, "between 0 and 1"),
        (17, ValueError, r"larger than the weight shape \(8\)|larger than the weight shape \(16\)"),
        ("4", TypeError, "rank must be"),
        (True, TypeError, "rank must be"),
    ],
)
def test_ranks_that_do_not_fit(rank, error, message):
    with pytest.raises(error, match=message):
        convert_to_lora(adapted(use_dora=True), rank)


def test_what_is_no_lora_is_refused():
    with pytest.raises(TypeError, match="do not support LoRA conversion: LoraLayer on Embedding"):
        convert_to_lora(adapted(target_modules=["embed_tokens", "q_proj"], use_dora=True), 4)
    with pytest.raises(TypeError, match="do not support LoRA conversion: LoraLayer on Conv1d"):
        convert_to_lora(adapted("convs", target_modules=["conv1"], use_dora=True), 4)
    with pytest.raises(TypeError, match="Could not detect any layer"):
        convert_to_lora(models.build("llama"), 4)
    with pytest.raises(ValueError, match="bias=all"):
        convert_to_lora(adapted("llama_bias", use_dora=True, bias="all"), 4)
    with pytest.raises(ValueError, match="'zz' does not exist"):
        convert_to_lora(adapted(use_dora=True), 4, adapter_name="zz")


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
@torch.no_grad()
def test_an_adapter_of_linear_layers_becomes_a_lora_of_full_rank(example, tmp_path):
    model, x = wrapped(example), example.inputs()
    linear = all(layer.kind.name == "linear" for layer in model.base_model.layers.values())
    if not linear or example.method not in CONVERTIBLE or example.name.startswith(UNFIT):
        with pytest.raises(TypeError, match="LoRA conversion"):
            quiet(save_as_lora)(tmp_path, model, 1.0)
        assert not list(tmp_path.iterdir())
        return
    quiet(save_as_lora)(tmp_path, model, 1.0)
    loaded = quiet(PeftModel.from_pretrained)(example.make_base(), tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert gap(loaded(x), model(x)) < 1e-5
