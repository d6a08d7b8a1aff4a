"""Starts of LoRA that data decides: EVA, CorDA, LoRA-GA; and files of starts that are subtracted."""

from __future__ import annotations

import json

import models
import pytest
import torch
from laws_table import base_tensors, gap, same_tensors, train_a_little
from safetensors.torch import load_file

import peft
from peft.methods.lora.corda import CordaConfig, preprocess_corda
from peft.methods.lora.loraga import GRADIENT, preprocess_loraga
from peft.ops.incremental_pca import IncrementalPCA

X = models.noise((40, models.WIDTH), 7)
TARGETS = ["lin0", "lin1"]


def base():
    return models.fill(models.Mlp())


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **options})


def start(kind, model, **options):
    """A model with an adapter of that start, after its data was collected."""
    if kind == "lora_ga":
        config = lora(init_lora_weights=kind, lora_ga_config=peft.LoraGAConfig(), **options)
        preprocess_loraga(model, config, lambda: model(X).square().sum().backward())
    elif kind == "corda":
        config = lora(init_lora_weights=kind, corda_config=CordaConfig(), **options)
        preprocess_corda(model, config, run_model=lambda: model(X))
    else:
        config = lora(init_lora_weights=kind, **options)
    return peft.get_peft_model(model, config).eval()


# -- subtracted starts -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"lin1": 1}, "alpha_pattern": {"lin0": 5}}]
)
@pytest.mark.parametrize("kind", ["lora_ga", "corda"])
def test_the_base_is_never_touched_and_files_are_plain_lora(kind, options, tmp_path):
    model = start(kind, base(), **options)
    fresh = base()
    assert gap(model(X), fresh(X)) < 1e-5 and same_tensors(base_tensors(model), base_tensors(fresh))
    assert all(layer.lora_B["default"].weight.abs().sum() > 0 for layer in model.base_model.layers.values())
    train_a_little(model)
    wanted = model(X)
    assert gap(wanted, fresh(X)) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(X), fresh(X))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 4 and config[f"{kind}_config"] is None
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert gap(loaded(X), wanted) < 1e-5
    merged = model.merge_and_unload()
    assert gap(merged(X), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["lora_ga", "corda"])
def test_training_goes_on_from_a_checkpoint(kind, tmp_path):
    model = start(kind, base())
    train_a_little(model)
    wanted = model(X)
    model.save_pretrained(tmp_path)
    train_a_little(model, seed=7)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.base_model.layers["lin0"].r["default"] == 2 and gap(model.eval()(X), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_other_subtracted_starts_become_plain_on_request(kind, tmp_path):
    model = start(kind, base(), use_rslora=True)
    train_a_little(model)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="not read")
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lin0.lora_A.weight"].shape[0] == 4
    assert gap(peft.PeftModel.from_pretrained(base(), tmp_path)(X), model(X)) < 1e-5
    plain = peft.get_peft_model(base(), lora())
    with pytest.raises(ValueError, match="nothing to convert"):
        plain.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion="a")


@pytest.mark.parametrize("kind", ["lora_ga", "corda"])
def test_data_that_was_not_collected_is_asked_for(kind):
    config = {"lora_ga": {"lora_ga_config": peft.LoraGAConfig()}, "corda": {"corda_config": CordaConfig()}}[kind]
    with pytest.raises(ValueError, match="preprocess_"):
        peft.get_peft_model(base(), lora(init_lora_weights=kind, **config))
    with pytest.raises(ValueError, match=f"{kind}_config"):
        lora(init_lora_weights=kind)
    with pytest.warns(UserWarning, match="no effect"):
        lora(**config)


# -- LoRA-GA ---------------------------------------------------------------------------------------------------------
def test_lora_ga_takes_the_mean_gradient_and_leaves_no_trace(tmp_path):
    model, config = base(), lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]

    def steps():
        for part in X.chunk(4):
            model(part).square().sum().backward()

    preprocess_loraga(model, config, steps, cache_file=str(tmp_path / "grads" / "g.bin"))
    twin = base()
    (twin(X).square().sum() / 4).backward()
    for name in TARGETS:
        torch.testing.assert_close(getattr(model.get_submodule(name), GRADIENT), twin.get_submodule(name).weight.grad)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert all(p.grad is None for p in model.get_submodule("lin0").parameters() if p.ndim == 2) and not model.training
    again = base()
    preprocess_loraga(
        again, config, lambda: pytest.fail("the cache was not read"), cache_file=str(tmp_path / "grads" / "g.bin")
    )
    assert torch.equal(getattr(again.lin0, GRADIENT), getattr(model.lin0, GRADIENT))


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_directions_are_those_of_the_gradient(direction, scale):
    config = lora(
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale),
        target_modules=["lin0"],
    )
    model = base()
    preprocess_loraga(model, config, lambda: model(X).square().sum().backward())
    gradient = getattr(model.lin0, GRADIENT)
    adapter = peft.get_peft_model(model, config).base_model.layers["lin0"].adapters["default"]
    A, B = adapter.factors()
    U, S, V = torch.linalg.svd(gradient, full_matrices=False)
    on_A, on_B = (A @ V.T).abs(), (U.T @ B).abs()
    chosen = {"ArBr": ([1, 3], [0, 2]), "A2rBr": ([2, 3], [0, 1]), "ArB2r": ([0, 1], [2, 3])}.get(direction)
    if chosen is not None:
        assert sorted(on_A.argmax(1).tolist()) == chosen[0] and sorted(on_B.argmax(0).tolist()) == chosen[1]
    length = 1 / 1.5 if scale == "gd_scale" else 1.0
    torch.testing.assert_close(A.norm(dim=1), torch.full((2,), length), rtol=1e-3, atol=1e-3)
    first = S[on_B.argmax(0)[0]]
    largest = torch.linalg.matrix_norm(base().lin0.weight, 2)
    size = {"stable": first * 24**0.25 / 4, "weight_svd": largest, "gd_scale": first / 1.5, "unit": first}[scale]
    torch.testing.assert_close(B.norm(dim=0)[0], size.detach(), rtol=1e-3, atol=1e-3)


# -- CorDA -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_the_part_of_w_that_its_inputs_choose(method, tmp_path):
    model = base()
    options = {
        "corda_method": method,
        "covariance_file": str(tmp_path / "c.bin"),
        "cache_file": str(tmp_path / "e.bin"),
    }
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(**options), target_modules=["lin0"])
    preprocess_corda(model, config, run_model=lambda: [model(part) for part in X.chunk(2)])
    C = sum((p / p.max().abs()).T @ (p / p.max().abs()) for p in X.chunk(2)) / 2
    assert torch.allclose(torch.load(tmp_path / "c.bin")["lin0"], C, atol=1e-4)
    damped = C + torch.eye(16) * C.diagonal().mean() * 0.01
    U, S, V = torch.linalg.svd(model.lin0.weight.detach() @ damped, full_matrices=False)
    part = slice(2) if method == "ipm" else slice(14, None)
    wanted = (U[:, part] * S[part]) @ V[part] @ torch.linalg.inv(damped)
    adapter = peft.get_peft_model(model, config).base_model.layers["lin0"].adapters["default"]
    A, B = adapter.factors()
    torch.testing.assert_close(adapter.scaling * B @ A, wanted, rtol=1e-3, atol=1e-3)
    again = base()
    preprocess_corda(again, config)  # both files are there now
    assert torch.equal(again.lin0.eigens.U_WC, model.lin0.eigens.U_WC) if hasattr(model.lin0, "eigens") else True


# -- EVA -------------------------------------------------------------------------------------------------------------
def batches(count=8):
    scale = 4 * 0.7 ** torch.arange(models.WIDTH)
    return [{"x": models.noise((48, models.WIDTH), 100 + i) * scale} for i in range(count)]


def eva(**options):
    settings = peft.EvaConfig(**{"tau": 0.9, **options})
    return lora(r=3, init_lora_weights="eva", eva_config=settings)


PLAIN = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}


def test_eva_starts_with_the_principal_components_of_inputs():
    model = peft.get_peft_model(base(), eva(rho=1.0))
    peft.initialize_lora_eva_weights(model, batches(), **PLAIN)
    data = torch.cat([b["x"] for b in batches()])
    V = torch.linalg.svd(data - data.mean(0), full_matrices=False)[2][:3]
    layer = model.base_model.layers["lin0"]
    cosines = (layer.lora_A["default"].weight @ V.T).abs().diagonal()
    assert (cosines > 0.9).all() and layer.lora_B["default"].weight.abs().sum() == 0
    assert gap(model(X), base()(X)) == 0


def test_eva_gives_ranks_to_where_they_explain_most(tmp_path):
    model = peft.get_peft_model(base(), eva(rho=2.0))
    peft.initialize_lora_eva_weights(model, batches(), **PLAIN)
    config = model.peft_config["default"]
    ranks = {path: layer.r["default"] for path, layer in model.base_model.layers.items()}
    assert sum(ranks.values()) == 6 and config.rank_pattern == {k: r for k, r in ranks.items() if r != 3}
    for path, layer in model.base_model.layers.items():
        assert layer.scaling["default"] == pytest.approx(1.0), path
    train_a_little(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(X), model.eval()(X))


def test_eva_state_can_be_made_first_and_of_a_plain_model():
    config = eva(rho=1.0)
    state = peft.get_eva_state_dict(base(), batches(), config, **PLAIN)
    assert {k: tuple(t.shape) for k, t in state.items()} == {"lin0": (3, 16), "lin1": (3, 24)}
    model = peft.get_peft_model(base(), config)
    peft.initialize_lora_eva_weights(model, eva_state_dict={f"base_model.model.{k}": t for k, t in state.items()})
    assert torch.equal(model.base_model.layers["lin1"].lora_A["default"].weight, state["lin1"])


def test_eva_looks_at_tokens_that_count():
    config = eva()
    config.task_type = "CAUSAL_LM"
    from peft.methods.lora.eva import (
        prepare_layer_inputs_fn_language_modeling,
        prepare_model_inputs_fn_language_modeling,
    )

    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([[-100, 1, 1], [2, -100, 3]]),
    }
    where = prepare_model_inputs_fn_language_modeling(batch, config)
    assert where.tolist() == [[0, 1], [1, 0], [1, 2]]
    x = models.noise((2, 3, 4), 3)
    assert torch.equal(prepare_layer_inputs_fn_language_modeling((x,), where, "a"), x[[0, 1, 1], [1, 0, 2]])


@pytest.mark.parametrize("call", [
    lambda m: peft.initialize_lora_eva_weights(m),
    lambda m: peft.initialize_lora_eva_weights(base(), batches()),
    lambda m: peft.get_eva_state_dict(m, []),
    lambda m: peft.get_eva_state_dict(base(), batches()),
    lambda m: peft.initialize_lora_eva_weights(peft.get_peft_model(base(), lora()), batches()),
    lambda m: peft.EvaConfig(rho=0.5),
    lambda m: peft.EvaConfig(tau=2),
])  # fmt: skip
def test_eva_says_what_is_missing(call):
    with pytest.raises(ValueError):
        call(peft.get_peft_model(base(), eva()))


@pytest.mark.parametrize("lowrank", [False, True])
def test_incremental_components_are_those_of_all_samples(lowrank):
    data = torch.cat([b["x"] for b in batches(5)])
    pca = IncrementalPCA(4, lowrank=lowrank, lowrank_seed=1 if lowrank else None, lowrank_q=12 if lowrank else None)
    for part in data.split(48):
        pca.partial_fit(part)
    centred = data - data.mean(0)
    S, V = torch.linalg.svd(centred, full_matrices=False)[1:]
    assert ((pca.components_ @ V[:4].T).abs().diagonal() > 0.97).all()
    torch.testing.assert_close(pca.singular_values_, S[:4], rtol=0.03, atol=0)
    torch.testing.assert_close(pca.mean_.float(), data.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pca.explained_variance_ratio_, S[:4] ** 2 / (S**2).sum(), rtol=0.06, atol=0)
    assert pca.transform(data).shape == (240, 4)
