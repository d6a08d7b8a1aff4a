"""LoHa and LoKr beyond the laws: dropout of rows and of whole updates, scaling, how sizes are factorised."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft
from peft.methods.lokr import factorization

METHODS = ["LoHaConfig", "LoKrConfig"]


def layer(config_class, **options):
    """A model of one linear layer with weight 0, so that its output is the update alone."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12, bias=False))
    nn.init.zeros_(base[0].weight)
    config = getattr(peft, config_class)(r=2, target_modules=["0"], init_weights=False, **options)
    return peft.get_peft_model(base, config).train()


def shares(model):
    """Of each output, what the dropout of one forward has left of it, (outputs,)."""
    x = models.noise((5, 16), 3)
    model.eval()
    still = model(x)
    model.train()
    y = model(x)
    share = (y * still).sum(0) / still.square().sum(0)
    torch.testing.assert_close(y, share * still)  # whole rows, the same for every input
    return share


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_rank_dropout_drops_rows(method):
    scales = {"rank_dropout_scale": True} if method == "LoKrConfig" else {}
    model = layer(method, rank_dropout=0.5, **scales)
    seen = torch.stack([shares(model) for _ in range(200)])
    kept = seen.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    some = kept.any(1)
    torch.testing.assert_close(seen[some].mean(1), torch.ones(int(some.sum())), atol=1e-4, rtol=0)


@torch.no_grad()
def test_rank_dropout_of_lokr_does_not_rescale_unless_told():
    seen = torch.stack([shares(layer("LoKrConfig", rank_dropout=0.5)) for _ in range(20)])
    assert torch.allclose(seen, seen.round(), atol=1e-4) and set(seen.round().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [2, 8])
def test_all_rows_dropped_is_no_update_and_no_nan(method, r):
    model = layer(method, rank_dropout=1.0, rank_pattern={"0": r})
    y = model(models.noise((5, 16), 3))
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_module_dropout_is_all_or_nothing(method):
    model = layer(method, module_dropout=0.5)
    with torch.no_grad():
        seen = torch.stack([shares(model) for _ in range(200)])
    assert torch.allclose(seen, seen[:, :1].expand_as(seen), atol=1e-4)
    assert 0.35 < seen.mean() < 0.65
    model(models.noise((5, 16), 3)).sum().backward()  # also where the update is dropped, for DDP's sake
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_merging_in_training_mode_drops_nothing(method):
    model, x = layer(method, rank_dropout=0.5, module_dropout=0.5), models.noise((5, 16), 3)
    wanted = model.eval()(x)
    model.train().merge_adapter()
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_scaling_can_be_set_and_put_back(method):
    """As diffusers does it."""
    model, x = layer(method, alpha=3).eval(), models.noise((5, 16), 3)
    adapted, once = model.base_model.layers["0"], model(x)
    assert adapted.scaling == {"default": 1.5} and adapted.r == {"default": 2} and adapted.alpha == {"default": 3}
    adapted.set_scale("default", 2.0)
    torch.testing.assert_close(model(x), 2 * once)
    adapted.scale_layer(3.0)
    torch.testing.assert_close(model(x), 6 * once)
    adapted.unscale_layer(3.0)
    torch.testing.assert_close(model(x), 2 * once)
    adapted.unscale_layer()
    torch.testing.assert_close(model(x), once)


def test_factorization():
    assert factorization(1024) == (32, 32)
    assert factorization(11008) == (86, 128)
    assert factorization(13) == (1, 13)
    assert factorization(4, 4) == (4, 1)
    assert factorization(250, 8) == (5, 50)
    for d in range(1, 200):
        for f in (-1, 2, 3, 4, 8, 16):
            small, large = factorization(d, f)
            assert small * large == d and (small == f or (small <= large and (f == -1 or small <= f)))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("LoHaConfig", {"r": 0}),
        ("LoHaConfig", {"alpha": float("nan")}),
        ("LoHaConfig", {"rank_dropout": 1.5}),
        ("LoHaConfig", {"rank_pattern": {"q": 0}}),
        ("LoHaConfig", {"init_weights": "lycoris"}),
        ("LoKrConfig", {"module_dropout": -0.1}),
        ("LoKrConfig", {"decompose_factor": 0}),
        ("LoKrConfig", {"init_weights": "other"}),
    ],
    ids=str,
)
def test_wrong_settings_are_named(method, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(peft, method)(**options)
