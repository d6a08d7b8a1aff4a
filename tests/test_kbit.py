"""prepare_model_for_kbit_training on models with quantized layers: dtypes, and checkpointing in any order."""

from __future__ import annotations

import models
import pytest
import torch
from helpers import needs
from storages import STORAGES, quantized
from torch import nn

import peft

pytestmark = pytest.mark.skipif(bool(needs("bitsandbytes", "transformers")), reason="needs bitsandbytes")
IDS = torch.arange(16).view(2, 8)
NF4 = next(s for s in STORAGES if s.name == "nf4")


def base(dtype=torch.float32):
    """A tiny Llama with 4-bit layers, and no flag that says so."""
    model = models.llama(hidden_size=64, intermediate_size=128, head_dim=16).to(dtype)
    head, model.lm_head = model.lm_head, nn.Identity()
    model = quantized(model, NF4)
    model.lm_head = head
    return model


def wrapped(model):
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def gradients(model):
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def before(options):
    return wrapped(peft.prepare_model_for_kbit_training(base(), gradient_checkpointing_kwargs=options))


def after(options):
    return peft.prepare_model_for_kbit_training(wrapped(base()), gradient_checkpointing_kwargs=options)


def without(options):
    model = wrapped(base())
    model.activation_checkpointing_enable(options) if hasattr(
        model, "activation_checkpointing_enable"
    ) else model.gradient_checkpointing_enable(options)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", [before, after, without])
def test_checkpointing_in_any_order(order, reentrant):
    wanted = gradients(wrapped(base()))
    model = order({"use_reentrant": reentrant})
    assert model.get_base_model().is_gradient_checkpointing
    found = gradients(model)
    assert found.keys() == wanted.keys() and len(wanted) == 8
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, msg=name)


@pytest.mark.parametrize(
    ("dtype", "upcast", "wanted"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float16, False, torch.float16),
    ],
)
def test_dtypes(dtype, upcast, wanted):
    model = peft.prepare_model_for_kbit_training(base(dtype), use_gradient_checkpointing=False, upcast=upcast)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.uint8, wanted}
    assert not model.is_gradient_checkpointing


def test_an_adapter_that_is_there_stays_trained():
    model = wrapped(base(torch.float16))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    peft.prepare_model_for_kbit_training(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
