"""Mixed batches one after the other, as a server has them: factors stacked for one batch may serve the next."""

from __future__ import annotations

import models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft import LoraConfig, get_peft_model

NAMES = ["a", "b", "c", "d", "__base__"]


def mixed() -> torch.nn.Module:
    model = None
    for i, name in enumerate(NAMES[:-1]):
        config = LoraConfig(r=2 + i, target_modules=["lin0", "lin1"], init_lora_weights=False)
        torch.manual_seed(i)
        if model is None:
            model = get_peft_model(models.fill(models.Mlp()), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


MODEL = mixed()


@given(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
@torch.no_grad()
def test_each_row_gets_its_own_adapter_whatever_batches_came_before(batches):
    for layer in MODEL.base_model.layers.values():
        layer.banks.clear()
    for names in batches:
        x = models.noise((len(names), models.WIDTH), len(names))
        found = MODEL(x, adapter_names=names)
        for row, name in enumerate(names):
            alone = MODEL(x[row : row + 1], adapter_names=[name])
            torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=1e-5)
