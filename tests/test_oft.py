"""OFT: what the laws do not cover."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft


def wrapped(base=None, **config):
    """A base with OFT in blocks of 4, whose generators are all 0.2."""
    settings = {"target_modules": ["lin0", "lin1"], "oft_block_size": 4, **config}
    model = peft.get_peft_model(models.build("mlp") if base is None else base, peft.OFTConfig(**settings))
    with torch.no_grad():
        for p in trained(model):
            p.fill_(0.2)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def norms(v):
    """‖Q‖ of each block."""
    return v.norm(dim=1) * 2**0.5


def test_coft_projects_the_parameter_in_training_and_only_the_rotation_elsewhere():
    model, x = wrapped(coft=True, eps=0.1).eval(), models.noise((4, models.WIDTH), 1)
    with torch.no_grad():
        still = model(x)
    assert all((v == 0.2).all() for v in trained(model))
    model.train()
    y = model(x)
    y.sum().backward()
    assert torch.allclose(y, still, atol=1e-6)
    for v in trained(model):
        assert torch.allclose(norms(v), torch.full_like(norms(v), 0.1 / len(v) ** 0.5)) and v.grad.abs().sum() > 0
    loose = wrapped(coft=True, eps=50.0).train()
    loose(x)
    assert all((v == 0.2).all() for v in trained(loose))


@pytest.mark.parametrize("exact", [True, False])
def test_rotations_are_orthogonal(exact):
    """The series nearly, the Cayley transform fully."""
    model = wrapped(use_cayley_neumann=not exact, num_cayley_neumann_terms=9)
    R = model.base_model.layers["lin0"].adapters["default"].blocks()
    assert (R @ R.mT - torch.eye(4)).abs().max() < (1e-6 if exact else 1e-2)
    assert (R - torch.eye(4)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"r": 4}, "r=4"),
        ({"oft_block_size": 0}, "oft_block_size=0"),
        ({"module_dropout": 1.5}, "module_dropout"),
        ({"eps": -1.0}, "eps"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms"),
    ],
)
def test_wrong_values_name_their_field(changes, names):
    with pytest.raises(ValueError, match=names):
        peft.OFTConfig(**changes)


def test_block_sizes_that_do_not_divide_become_the_nearest_that_does():
    with pytest.warns(UserWarning, match="oft_block_size=7 does not divide the 16 inputs of lin0: it gets 8"):
        model = wrapped(oft_block_size=7, target_modules=["lin0"])
    assert model.base_model.layers["lin0"].oft_block_size == {"default": 8}
    assert model.peft_config["default"].oft_block_size == 7


def test_files_of_the_old_format_are_refused_with_a_way_to_convert(tmp_path):
    model = wrapped()
    old = {k.replace("oft_R.weight", "oft_r"): torch.zeros(4, 4, 4) for k in peft.get_peft_model_state_dict(model)}
    with pytest.raises(ValueError, match=r"oft_r.*To convert it"):
        peft.set_peft_model_state_dict(model, old)
    with pytest.raises(ValueError, match=r"no oft_block_size.*To convert it"):
        peft.PeftConfig.from_peft_type(peft_type="OFT", r=4)
    with pytest.warns(UserWarning, match="trained with peft 0.17.1"):
        peft.PeftConfig.from_peft_type(
            peft_type="OFT", oft_block_size=4, use_cayley_neumann=True, peft_version="0.17.1@abc"
        )


def test_grouped_convolutions_are_refused_by_name():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match=r"cannot adapt 0: it is a convolution with groups"):
        peft.get_peft_model(base, peft.OFTConfig(target_modules=["0"], oft_block_size=2))
