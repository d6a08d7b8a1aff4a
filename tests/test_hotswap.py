"""Swapping one LoRA for another in place: right outputs, no recompilation, nothing changed where it is refused."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch import nn

from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.errors import PeftWarning
from peft.integrations.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


def adapted(base: str = "llama", seed: int = 1, **config) -> PeftModel:
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **config}
    model = get_peft_model(models.build(base), LoraConfig(**config))
    models.perturb(model, seed=seed * 100, scale=0.4)
    return model.eval()


def swap(model, other, change=lambda tensors: tensors, **options) -> None:
    tensors = change(get_peft_model_state_dict(other, save_embedding_layers=False))
    hotswap_adapter_from_state_dict(model, tensors, "default", copy.deepcopy(other.peft_config["default"]), **options)


def names_in_the_model(tensors: dict) -> dict:
    """File keys as they stand in the model; diffusers passes these."""
    return {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()}


PAIRS = {
    "same rank": ("llama", {}, {"lora_alpha": 3}),
    "larger": ("llama", {}, {"r": 8}),
    "smaller": ("llama", {}, {"r": 2}),
    "rslora": ("llama", {"use_rslora": True}, {"use_rslora": True, "r": 2, "lora_alpha": 3}),
    "patterns": ("llama", {}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}),
    "dora": ("llama", {"use_dora": True}, {"use_dora": True, "r": 2}),
    "lora_bias": ("llama", {"lora_bias": True}, {"lora_bias": True, "r": 2}),
    "embedding": ("embedded", {"target_modules": ["emb", "lin"]}, {"target_modules": ["emb", "lin"], "r": 2}),
    "tied": ("llama_tied", *[{"target_modules": ["embed_tokens"], "ensure_weight_tying": True}] * 2),
    "convolutions": ("convs", *[{"target_modules": ["conv1", "conv2", "grouped", "conv3"]}] * 2),
    "grouped": ("convs", {"target_modules": ["grouped"]}, {"target_modules": ["grouped"], "r": 2}),
    "attention": ("attention", {"target_modules": ["mha"]}, {"target_modules": ["mha"], "r": 2}),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_swapped_adapter_computes_what_its_own_model_does(pair, prepared):
    base, first, second = PAIRS[pair]
    model, other = adapted(base, **first), adapted(base, seed=2, **second)
    if prepared:
        before = models.run(model, base)
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(models.run(model, base), before)
    swap(model, other)
    torch.testing.assert_close(models.run(model, base), models.run(other, base))
    for mine, its in zip(model.base_model.layers.values(), other.base_model.layers.values()):
        assert (mine.r, mine.lora_alpha) == (its.r, its.lora_alpha)
        assert float(mine.scaling["default"]) == pytest.approx(its.scaling["default"])
        assert isinstance(mine.scaling["default"], torch.Tensor) is prepared


@pytest.mark.parametrize("change", [names_in_the_model, lambda t: {k: v.bfloat16().float() for k, v in t.items()}])
def test_keys_of_the_file_and_of_the_model(change):
    model, other = adapted(), adapted(seed=2)
    swap(model, other, change)
    torch.testing.assert_close(models.run(model, "llama"), models.run(other, "llama"), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_left_out_no_longer_change_anything(config):
    model, other = adapted(**config), adapted(seed=2, **config)
    swap(model, other, lambda tensors: {k: t for k, t in tensors.items() if "q_proj" in k})
    base = models.build("llama").model.layers[0].self_attn.v_proj
    x = models.noise((3, 16), 5)
    torch.testing.assert_close(model.base_model.layers["model.layers.0.self_attn.v_proj"](x), base(x))


def test_from_a_folder_and_saved_again(tmp_path):
    """After a swap into wider tensors, a saved file still says what the adapter computes. Upstream's did not load."""
    model, other = adapted(), adapted(seed=2, r=2, lora_alpha=5)
    other.save_pretrained(tmp_path / "other")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, tmp_path / "other", "default", torch_device="cpu")
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path / "again")
    torch.testing.assert_close(models.run(loaded, "llama"), models.run(other, "llama"))


def test_without_a_peft_model():
    config = LoraConfig(target_modules=["q_proj"], r=4)
    model, other = (inject_adapter_in_model(config, models.build("llama")) for _ in range(2))
    models.perturb(other)
    file = {f"base_model.model.{k}": t for k, t in get_peft_model_state_dict(other).items()}
    hotswap_adapter_from_state_dict(model, file, "default", config)
    torch.testing.assert_close(models.run(model, "llama"), models.run(other, "llama"))


class Net(nn.Module):
    """A linear layer, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.conv = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Conv1d(3, 4, 3)

    def forward(self, x):
        return self.conv(torch.tanh(self.lin(self.emb(x))))


@pytest.mark.parametrize("targets", [["lin"], ["lin", "conv", "emb"]])
def test_adapters_of_other_ranks_cause_no_recompilation(targets):
    x, seen = torch.tensor([[1, 5, 2], [3, 3, 9]]), []

    def counting(graph, inputs):
        seen.append(graph)
        return graph.forward

    def net(r, seed):
        model = get_peft_model(models.fill(Net()), LoraConfig(target_modules=targets, r=r, lora_alpha=5))
        models.perturb(model, seed=seed)
        return model.eval()

    model, others = net(4, 1), [net(2, 20), net(8, 40), net(1, 60)]
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        compiled(x)
        assert len(seen) > 0
        graphs = len(seen)
        for other in others:
            swap(compiled, other)
            torch.testing.assert_close(compiled(x), other(x))
            model.base_model.layers["lin"].set_scale("default", 0.5)  # diffusers sets weights after a swap
            other.base_model.layers["lin"].set_scale("default", 0.5)
            torch.testing.assert_close(compiled(x), other(x))
        assert len(seen) == graphs
        with pytest.warns(PeftWarning, match="compile again"):
            swap(compiled, net(9, 80))
    torch._dynamo.reset()


def test_preparing_updates_a_config_and_keeps_its_scaling():
    model = adapted(rank_pattern={"q_proj": 6})
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    patterns = LoraConfig(r=4, rank_pattern={"q_proj": 6}, target_modules=["q_proj"])
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={"a": config, "b": patterns})
    assert (config.r, config.lora_alpha) == (8, 12)
    assert (patterns.r, patterns.rank_pattern) == (8, {"q_proj": 8})
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    assert (layer.lora_A["default"].out_features, layer.lora_B["default"].in_features) == (8, 8)
    assert layer.lora_A["default"].weight.requires_grad


def test_preparing_too_late_or_in_vain():
    model = adapted()
    with pytest.raises(ValueError, match="has rank"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    assert isinstance(model.base_model.layers["model.layers.0.self_attn.q_proj"].scaling["default"], float)
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(models.build("llama"), target_rank=8)
    with pytest.raises(ValueError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="maybe")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")
    experts = get_peft_model(models.build("parameters"), LoraConfig(target_parameters=["experts.w1"], r=2))
    with pytest.raises(NotImplementedError, match="cannot change its rank"):
        prepare_model_for_compiled_hotswap(experts, target_rank=8)


def half(tensors):
    return {k: t for k, t in tensors.items() if "layers.0.self_attn.q_proj.lora_A" not in k}


def cut(tensors):
    return {k: t[:, :3] if "lora_A" in k else t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("other", "change", "error", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, None, RuntimeError, "unexpected keys found.*k_proj"),
        ({}, half, RuntimeError, "did not succeed"),
        ({}, cut, RuntimeError, "did not succeed"),
        ({}, lambda tensors: {}, RuntimeError, "no tensors"),
        ({"init_lora_weights": "pissa"}, None, ValueError, "save_as_lora"),
    ],
)
def test_refusals_change_nothing(other, change, error, message):
    model = adapted()
    before = models.run(model, "llama")
    with pytest.raises(error, match=message):
        swap(model, adapted(seed=2, **other), change or (lambda tensors: tensors))
    assert models.run(model, "llama").equal(before)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_kasa_is_refused(first, second):
    """What it does is more than its factors; Hugging Face PEFT swaps a plain LoRA in and computes something else."""
    kasa = {"kasa_config": KasaConfig()}
    model, other = (adapted(**(kasa if k else {})) for k in (first, second))
    before = models.run(model, "llama")
    with pytest.raises(ValueError, match="KaSA adapter also takes"):
        swap(model, other)
    assert models.run(model, "llama").equal(before)


def test_merged_or_unknown_adapters_are_refused(tmp_path):
    model, other = adapted(), adapted(seed=2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        swap(model, other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        hotswap_adapter(model, tmp_path, "zz")


def test_configs_are_compared():
    def config(**changes):
        return LoraConfig(target_modules=["a"], **changes)

    check_hotswap_configs_compatible(config(), config(r=4, lora_alpha=1, rank_pattern={"a": 2}))
    for changes in ({"use_rslora": True}, {"lora_dropout": 0.1}, {"alpha_pattern": {"a": 1}}, {"use_dora": True}):
        with pytest.raises(ValueError, match=f"incompatible: for {next(iter(changes))}"):
            check_hotswap_configs_compatible(config(**changes), config())
