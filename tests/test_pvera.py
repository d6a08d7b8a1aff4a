"""PVeRA draws its inner vector: which numbers, from which generator, and what of it is left after training."""

from __future__ import annotations

import itertools

import models
import pytest
import torch
from laws_table import BY_NAME, gap, train_a_little, wrapped

import peft
from peft.ops import folded


def layer_of(**config):
    """One adapted layer in training mode, and an input."""
    model = wrapped(BY_NAME["pvera"], **config)
    return model.base_model.layers["lin0"].train(), BY_NAME["pvera"].inputs()


def drawn(layer, x, noise):
    """y by its definition, in float64, for the given noise."""
    base, b, d = layer.base_layer, layer.pvera_lambda_b["default"], layer.pvera_lambda_d["default"]
    A, B = layer.pvera_A["default"][:, : x.shape[1]].double(), layer.pvera_B["default"][: len(b)].double()
    mean, log_variance = (x.double() @ A.T * d).chunk(2, -1)
    z = mean + noise * torch.exp(log_variance / 2)
    return x.double() @ base.weight.double().T + base.bias + (z @ B.T) * b


@torch.no_grad()
def test_training_draws_from_the_normal_distribution_that_A_and_d_give():
    layer, x = layer_of()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    assert gap(found, drawn(layer, x, torch.randn(len(x), 6))) < 2e-6
    assert not torch.equal(found, layer(x))


def test_gradients_are_those_of_the_definition():
    layer, x = layer_of()
    trained = [layer.pvera_lambda_b["default"], layer.pvera_lambda_d["default"]]
    x.requires_grad_()
    results = []
    for run in (layer, lambda x: drawn(layer, x, torch.randn(len(x), 6))):
        torch.manual_seed(3)
        y = run(x)
        results.append(torch.autograd.grad((y * models.noise(y.shape, 1)).sum(), [x, *trained]))
    assert all(gap(found, wanted) < 5e-6 for found, wanted in zip(*results))


@torch.no_grad()
def test_a_seeded_generator_is_the_layers_own():
    layer, x = layer_of(generator_seed=5)
    twin, _ = layer_of(generator_seed=5)
    generator = torch.Generator().manual_seed(5)
    for seed in range(3):
        torch.manual_seed(seed)
        found = layer(x)
        assert torch.equal(found, twin(x))
        assert gap(found, drawn(layer, x, torch.randn(len(x), 6, generator=generator))) < 2e-6


@torch.no_grad()
def test_sampling_at_inference_goes_on_in_evaluation():
    model, x = wrapped(BY_NAME["pvera"], sample_at_inference=True), BY_NAME["pvera"].inputs()
    outputs = [model(x[:2]) for _ in range(folded.CALLS + 3)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    mixed = model(x, adapter_names=["default", "__base__"] * 3)
    assert gap(mixed[1::2], BY_NAME["pvera"].make_base()(x)[1::2]) < 1e-6 and not torch.equal(mixed, model(x))


@torch.no_grad()
def test_what_samples_is_merged_to_its_mean():
    x = BY_NAME["pvera"].inputs()
    mean = wrapped(BY_NAME["pvera"])(x)
    merged = wrapped(BY_NAME["pvera"], sample_at_inference=True).merge_and_unload()
    assert gap(merged(x), mean) < 2e-6


def test_variance_needs_rows_of_its_own():
    config = peft.PveraConfig(r=3, target_modules=["lin0"])
    model = peft.get_peft_model(BY_NAME["pvera"].make_base(), config)
    train_a_little(model)
    tensors = peft.get_peft_model_state_dict(model)
    assert len(tensors["base_model.pvera_A"]) == len(tensors["base_model.model.lin0.pvera_lambda_d"]) == 6
    assert tensors["base_model.pvera_B"].shape[1] == 3


@pytest.mark.parametrize("wrong", [{"r": 0}, {"pvera_dropout": 1.5}, {"generator_seed": "x"}, {"bias": "lora_only"}])
def test_wrong_values_name_their_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        peft.PveraConfig(**wrong)
