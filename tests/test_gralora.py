"""GraLoRA beyond the laws: the block product's derivatives, refused settings."""

from __future__ import annotations

import models
import pytest
import torch

import peft
from peft.methods import gralora


def tensors(k, dtype=torch.float64, rows=3, inp=8, out=12, r=4):
    shapes = [(rows, out), (rows, inp), (k, inp // k, r), (k, r, out // k)]
    return [models.noise(s, 3 + i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_derivatives_of_the_block_product(k):
    def run(*given):
        return gralora.add(*given, 1.7)

    given = tensors(k)
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
    torch.testing.assert_close(run(*given), gralora._plain(*given, 1.7))


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_any_layout_and_no_write_to_what_is_given(layout):
    y, x, A, B = (t.detach() for t in tensors(2))
    x = x.t().contiguous().t() if layout == "transposed" else x[:1].expand(3, -1)
    y, x = y.view(3, 1, -1), x.view(3, 1, -1).requires_grad_()
    before = [t.clone() for t in (y, x, A, B)]
    found = gralora.add(y, x, A, B, 2.0)
    found.sum().backward()
    assert all(map(torch.equal, (y, x, A, B), before))
    torch.testing.assert_close(found[:, 0], gralora._plain(y[:, 0], x[:, 0], A, B, 2.0))


@pytest.mark.parametrize("frozen", range(4))
def test_what_needs_no_gradient_gets_none(frozen):
    given = tensors(2)
    given[frozen].requires_grad_(False)
    gralora.add(*given, 1.0).sum().backward()
    assert [t.grad is None for t in given] == [i == frozen for i in range(4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"GraloraConfig\.r must be"),
        ({"hybrid_r": -1}, r"GraloraConfig\.hybrid_r must be"),
        ({"gralora_k": 0}, r"GraloraConfig\.gralora_k must be"),
        ({"gralora_dropout": 2}, r"GraloraConfig\.gralora_dropout must be"),
        ({"r": 5}, r"GraloraConfig\.r must be divisible by gralora_k"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.GraloraConfig(**settings)


def test_blocks_must_divide_the_layer():
    with pytest.raises(ValueError, match="gralora_k=2 does not divide lin1, whose weight is 5 x 24"):
        peft.get_peft_model(models.build("mlp"), peft.GraloraConfig(r=4, target_modules=["lin1"]))


def test_the_common_pair_sees_dropout_too():
    config = peft.GraloraConfig(r=4, hybrid_r=3, gralora_dropout=1.0, target_modules=["lin0"], init_weights=False)
    model = peft.get_peft_model(models.build("mlp"), config)
    layer, x = model.base_model.layers["lin0"], models.noise((3, models.WIDTH), 7)
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    assert not torch.equal(layer.eval()(x), layer.base_layer(x))
