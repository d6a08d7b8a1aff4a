"""Arrow: the routers that upstream makes, what they choose, and what they refuse."""

from __future__ import annotations

import copy
import json
import pickle

import make_arrow
import models
import pytest
import torch
from helpers import FIXTURES
from safetensors.torch import load_file

import peft

ARROW = FIXTURES / "arrow"
IDS = models.inputs("llama")["input_ids"]
LORA = {"r": 3, "target_modules": make_arrow.TARGETS, "task_type": "CAUSAL_LM"}
pytestmark = pytest.mark.filterwarnings("ignore")


def router(tmp_path, **settings):
    return make_arrow.make_model(peft, tmp_path, settings)


def layer_of(model, name="q_proj"):
    return next(layer for path, layer in model.base_model.layers.items() if path.endswith(name))


def formula(layer, x, top_k, temperature=1.0, general=()):
    """Token by token, from the definition."""
    tasks = [n for n in layer.adapters if n.startswith("task_")]
    mean_A = sum(layer.lora_A[g].weight for g in general) / max(len(general), 1)
    mean_B = sum(layer.lora_B[g].weight for g in general) / max(len(general), 1)
    deltas = [(layer.lora_B[n].weight - mean_B) @ (layer.lora_A[n].weight - mean_A) for n in tasks]
    directions = torch.stack([torch.linalg.svd(d)[2][0] for d in deltas])
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        alignment = (directions @ token).abs()
        chosen = alignment.argsort(descending=True)[:top_k]
        weights = torch.softmax(alignment[chosen] / temperature, 0)
        y = layer.base_layer(token)
        rows.append(y + sum(w * layer.scaling[tasks[i]] * (deltas[i] @ token) for w, i in zip(weights, chosen)))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("case", make_arrow.CASES)
def test_computes_what_upstream_does(case, tmp_path):
    wanted = load_file(ARROW / "expected.safetensors")[case]
    found = models.run(router(tmp_path, **make_arrow.CASES[case]), "llama")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - models.run(models.llama(), "llama")).abs().max() > 1e-2


@pytest.mark.parametrize("case", make_arrow.CASES)
@torch.no_grad()
def test_computes_what_the_formula_says(case, tmp_path):
    settings = make_arrow.CASES[case]
    model, x = router(tmp_path, **settings), models.noise((2, 5, models.WIDTH), 3)
    general = ("gks_0", "gks_1") if settings.get("use_gks") else ()
    wanted = formula(layer_of(model), x, settings["top_k"], settings.get("router_temperature", 1.0), general)
    torch.testing.assert_close(layer_of(model)(x), wanted, atol=1e-5, rtol=1e-5)


def test_its_files_are_upstreams(tmp_path):
    model = router(tmp_path, **make_arrow.CASES["two"])
    model.save_pretrained(tmp_path / "all")
    folders = tmp_path / "all/arrow_router", ARROW / "router"
    found, wanted = (json.loads((f / "adapter_config.json").read_text()) for f in folders)
    for config in (found, wanted):
        config.pop("peft_version")
        config["target_modules"] = sorted(config["target_modules"])
    assert found == wanted
    tensors = load_file(ARROW / "router" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "all/arrow_router" / "adapter_model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in saved.items()} == {k: (v.dtype, v.shape) for k, v in tensors.items()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".arrow_router." in n for n in trained)


def test_a_saved_router_routes_again(tmp_path):
    """Upstream cannot load the router that it has saved: its adapters' names get lost."""
    model = router(tmp_path, **make_arrow.CASES["general"])
    wanted = models.run(model, "llama")
    model.save_pretrained(tmp_path / "all")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "all/task_0", adapter_name="task_0")
    for name in ("task_1", "task_2", "gks_0", "gks_1", "arrow_router"):
        again.load_adapter(tmp_path / "all" / name, name)
    again.set_adapter("arrow_router")
    assert torch.equal(models.run(again, "llama"), wanted)
    theirs = peft.PeftConfig.from_pretrained(ARROW / "router")
    assert theirs.arrow_config.task_adapter_names == ["task_0", "task_1", "task_2"] and theirs.arrow_config.top_k == 2


@torch.no_grad()
def test_general_knowledge_is_taken_from_copies(tmp_path):
    """Upstream overwrites the task adapters."""
    model = router(tmp_path, **make_arrow.CASES["general"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    models.run(model, "llama")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
def test_follows_its_adapters(tmp_path):
    model, x = router(tmp_path, top_k=2), models.noise((4, models.WIDTH), 3)
    layer = layer_of(model)
    first = layer(x)
    layer.lora_A["task_1"].weight.copy_(models.noise(layer.lora_A["task_1"].weight.shape, 9))
    assert not torch.equal(layer(x), first)
    torch.testing.assert_close(layer(x), formula(layer, x, 2), atol=1e-5, rtol=1e-5)
    layer.set_scale("task_1", 3)
    torch.testing.assert_close(layer(x), formula(layer, x, 2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beside_others_and_in_mixed_batches(tmp_path):
    model = router(tmp_path, top_k=2)
    routed, base = models.run(model, "llama"), models.run(models.llama(), "llama")
    model.set_adapter("task_1")
    task = models.run(model, "llama")
    mixed = model(input_ids=IDS, adapter_names=["arrow_router", "task_1"]).logits
    torch.testing.assert_close(mixed[0], routed[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], task[1], atol=1e-5, rtol=1e-5)
    model.set_adapter("arrow_router")
    with model.disable_adapter():
        assert torch.equal(models.run(model, "llama"), base)
    x = models.noise((4, models.WIDTH), 3)
    layer = layer_of(model)
    apart = layer(x) + layer.adapters["task_0"].output(x, layer.base_layer(x)) - layer.base_layer(x)
    model.base_model.set_adapter(["arrow_router", "task_0"])
    torch.testing.assert_close(layer(x), apart, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_adapters_and_what_comes_before(tmp_path):
    model = router(tmp_path, top_k=2)
    model.set_requires_grad(["task_0", "task_1", "task_2"], True)
    layer, x = layer_of(model), models.noise((6, models.WIDTH), 3).requires_grad_()
    pairs = [(layer.lora_A[f"task_{i}"].weight, layer.lora_B[f"task_{i}"].weight) for i in range(3)]
    trained = [x, *(t for pair in pairs for t in pair)]
    for _ in range(2):  # a graph of its own for each forward
        found = torch.autograd.grad(layer(x).sin().sum(), trained)
    directions = [torch.linalg.svd(B @ A)[2][0].detach() for A, B in pairs]
    alignment = (x @ torch.stack(directions).T).abs()
    best, chosen = alignment.topk(2, -1)
    weights = torch.zeros_like(alignment).scatter(-1, chosen, best.softmax(-1))
    y = layer.base_layer(x) + sum(
        weights[:, i : i + 1] * layer.scaling[f"task_{i}"] * (x @ A.T @ B.T) for i, (A, B) in enumerate(pairs)
    )
    for a, b in zip(found, torch.autograd.grad(y.sin().sum(), trained)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies(how, tmp_path):
    model = router(tmp_path, top_k=2)
    wanted = models.run(model, "llama")
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(models.run(twin, "llama"), wanted)
    layer_of(twin).lora_B["task_0"].weight.fill_(1.0)
    assert not torch.equal(models.run(twin, "llama"), wanted) and torch.equal(models.run(model, "llama"), wanted)


def test_a_router_of_fewer_adapters_than_top_k(tmp_path):
    tasks, _ = make_arrow.save_adapters(peft, tmp_path)
    model = peft.create_arrow_model(models.llama(), tasks[:1], peft.ArrowConfig(top_k=3)).eval()
    routed = models.run(model, "llama")
    model.set_adapter("task_0")
    torch.testing.assert_close(routed, models.run(model, "llama"), atol=1e-5, rtol=1e-5)


def test_merging_is_refused(tmp_path):
    model = router(tmp_path, top_k=2)
    before = models.run(model, "llama")
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="cannot be merged"):
            verb()
    assert torch.equal(models.run(model, "llama"), before)


# -- what it refuses -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"top_k": 0}, "top_k"), ({"router_temperature": 0}, "router_temperature"), ({"top_k": "2"}, "top_k must be int")],
)
def test_settings_that_it_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.ArrowConfig(**settings)
    with pytest.raises(ValueError, match=message):
        peft.LoraConfig(arrow_config=settings)


def test_what_create_arrow_model_refuses(tmp_path):
    tasks, _general = make_arrow.save_adapters(peft, tmp_path)
    with pytest.raises(ValueError, match="task_specific_adapter_paths is empty"):
        peft.create_arrow_model(models.llama(), [], peft.ArrowConfig())
    with pytest.raises(ValueError, match="needs general_adapter_paths"):
        peft.create_arrow_model(models.llama(), tasks, peft.ArrowConfig(use_gks=True))
    other = peft.get_peft_model(models.llama(), peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    other.save_pretrained(tmp_path / "other")
    for paths in ([tasks[0], str(tmp_path / "other")], [str(tmp_path / "other"), tasks[0]]):
        with pytest.raises(ValueError, match="adapters of the same layers"):
            peft.create_arrow_model(models.llama(), paths, peft.ArrowConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"use_dora": True}, "without magnitudes"), ({"lora_bias": True}, "biases"), ({"r": 2}, "need the same rank")],
)
def test_adapters_that_it_cannot_use(changes, message, tmp_path):
    tasks, general = make_arrow.save_adapters(peft, tmp_path)
    peft.get_peft_model(models.llama(), peft.LoraConfig(**{**LORA, **changes})).save_pretrained(tmp_path / "other")
    tasks = [tasks[0], str(tmp_path / "other")]
    model = peft.create_arrow_model(models.llama(), tasks, peft.ArrowConfig(use_gks=True), general)
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS)


def test_a_router_without_its_adapters_says_so(tmp_path):
    model = router(tmp_path, top_k=2)
    model.delete_adapter("task_1")
    with pytest.raises(ValueError, match="there is no 'task_1'"):
        model(input_ids=IDS)
    alone = peft.get_peft_model(models.llama(), peft.LoraConfig(arrow_config=peft.ArrowConfig(), **LORA))
    with pytest.raises(ValueError, match="task_adapter_names"):
        alone(input_ids=IDS)
