"""LoRA+, LoRA-FA and the Riemannian preconditioner, against their papers' formulas."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from laws_table import train_a_little
from torch import nn

import peft
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer


def model_of(**options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], **options})
    model = peft.get_peft_model(models.fill(models.Mlp()), config)
    train_a_little(model)
    return model


def backward(model):
    model.zero_grad()
    model(models.noise((6, models.WIDTH), 7)).square().sum().backward()


def factors(model, layer):
    held = model.base_model.layers[layer].adapters["default"]
    return held.factors()


# -- LoRA+ -------------------------------------------------------------------------------------------------------
def test_loraplus_groups():
    model = model_of(use_dora=True, lora_bias=False, modules_to_save=[])
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, eps=1e-7
    )
    names = {id(p): n for n, p in model.named_parameters()}
    slow, embeddings, fast, no_decay = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert {n.split(".")[-3] for n in slow} == {"lora_A"} and not embeddings and not no_decay
    assert all(".lora_B." in n or "magnitude" in n for n in fast) and len(fast) == 4
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-6, 8e-3, 8e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert optimizer.defaults["eps"] == 1e-7
    backward(model)
    optimizer.step()


def test_loraplus_knows_embeddings_biases_and_norms():
    base = models.llama()
    config = peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], lora_bias=False, modules_to_save=["norm"], bias="none"
    )
    model = peft.get_peft_model(base, config)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0, loraplus_lr_embedding=0.5
    )
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert all("lora_embedding" in n for n in groups[1]) and len(groups[1]) == 2
    assert len(groups[3]) == 5 and all("norm" in n for n in groups[3])
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert sum(map(len, groups)) == sum(p.requires_grad for p in model.parameters())


# -- LoRA-FA -----------------------------------------------------------------------------------------------------
def test_lorafa_moves_b_along_the_projected_gradient():
    model = model_of(rank_pattern={"lin1": 2})
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.01, weight_decay=0.1)
    assert isinstance(optimizer, LoraFAOptimizer)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    state = {}
    for step in range(1, 4):
        backward(model)
        wanted = {}
        for layer, s in (("lin0", 6 / 4), ("lin1", 6 / 2)):
            A, B = (t.detach().double() for t in factors(model, layer))
            g = factors(model, layer)[1].grad.double() @ torch.linalg.pinv(A @ A.T) / s**2
            m, v = state.get(layer, (0, 0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            state[layer] = m, v
            moved = B - 0.01 * (m / (1 - 0.9**step)) / (
                (v / (1 - 0.999**step)).sqrt() + 1e-6 / (1 - 0.999**step) ** 0.5
            )
            wanted[layer] = moved * (1 - 0.01 * 0.1)
        before = {layer: factors(model, layer)[0].clone() for layer in wanted}
        optimizer.step()
        for layer, value in wanted.items():
            A, B = factors(model, layer)
            assert torch.equal(A, before[layer])
            torch.testing.assert_close(B.double(), value, rtol=1e-4, atol=1e-5)


def test_lorafa_state_survives_saving():
    model, other = model_of(), model_of()
    first, second = (create_lorafa_optimizer(m, r=4, lora_alpha=6, lr=0.01) for m in (model, other))
    backward(model)
    first.step()
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for m, o in ((model, first), (other, second)):
        backward(m)
        o.step()
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_lorafa_refuses_another_scaling_than_the_configs():
    with pytest.raises(ValueError, match="use_rslora"):
        create_lorafa_optimizer(model_of(), r=4, lora_alpha=6, lr=0.01, use_rslora=True)
    rslora = create_lorafa_optimizer(model_of(use_rslora=True), r=4, lora_alpha=6, lr=0.01)
    assert rslora.param_groups[0]["scaling_factor"] == 3.0
    assert {s for s in rslora.param_groups[0]["scaling_factors"] if s} == {3.0}


# -- Riemannian --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_riemannian_gradients_are_preconditioned(dtype):
    model = model_of(use_dora=True)
    for layer in ("lin0", "lin1"):
        for p in factors(model, layer):
            p.data = p.data.to(dtype)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    backward(model)
    wanted, eye = {}, 0.1 * torch.eye(4, dtype=torch.float64)
    for n, p in model.named_parameters():
        if p.requires_grad:
            wanted[n] = p.detach().double() - p.grad.double()
    for layer in ("lin0", "lin1"):
        A, B = factors(model, layer)
        a, b, key = A.detach().double(), B.detach().double(), f"base_model.model.{layer}"
        wanted[f"{key}.lora_A.default.weight"] = a - torch.linalg.inv(b.T @ b + eye) @ A.grad.double()
        wanted[f"{key}.lora_B.default.weight"] = b - B.grad.double() @ torch.linalg.inv(a @ a.T + eye)
    optimizer.step()
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    for n, p in model.named_parameters():
        if n in wanted:
            torch.testing.assert_close(p.double(), wanted[n], rtol=tolerance, atol=tolerance)


def test_riemannian_says_what_it_cannot_do():
    model = model_of()
    with pytest.raises(TypeError, match="optimizer_cls"):
        create_riemannian_optimizer(model, nn.Linear, lr=1.0)
    with pytest.raises(ValueError, match="closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1.0)
    with pytest.raises(ValueError, match="does not support closures"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0).step(lambda: 0)
    with pytest.raises(ValueError, match="lora_A/lora_B"):
        create_riemannian_optimizer(models.Mlp(), torch.optim.SGD, lr=1.0)
