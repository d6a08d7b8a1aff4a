"""Lily: the definition, and who shares what."""

from __future__ import annotations

import models
import torch
from laws_table import train_a_little

import peft


def test_output_is_that_of_the_definition():
    model = peft.get_peft_model(
        models.fill(models.Mlp()), peft.LilyConfig(r=3, num_B=4, scaling=2.0, target_modules=["lin1"])
    )
    train_a_little(model)
    layer, x = model.base_model.layers["lin1"], models.noise((2, 5, 24), 3)
    a = layer.adapters["default"]
    A, B, R = (m.weight.detach().double() for m in (a.lily_A, a.lily_B, a.lily_router))
    h = x.double() @ A.T
    p = torch.softmax(h @ R.T, -1).reshape(-1, 4).mean(0)
    base = layer.get_base_layer()
    wanted = x.double() @ base.weight.double().T + base.bias.double()
    wanted = wanted + 2 * sum(p[i] * h @ B[3 * i : 3 * i + 3] for i in range(4))
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)


def test_neighbours_share_a_and_all_share_b(tmp_path):
    config = peft.LilyConfig(r=3, stride_A=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(models.llama(num_hidden_layers=4), config)
    train_a_little(model)

    def check(model):
        q = [layer.adapters["default"] for path, layer in model.base_model.layers.items() if path.endswith("q_proj")]
        v = [layer.adapters["default"] for path, layer in model.base_model.layers.items() if path.endswith("v_proj")]
        assert len({id(a.lily_B.weight) for a in q}) == 1 and q[0].lily_B is not v[0].lily_B
        assert [id(a.lily_A.weight) == id(q[0].lily_A.weight) for a in q] == [True, True, False, False]
        assert len({id(a.lily_router.weight) for a in q}) == 4

    check(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(num_hidden_layers=4), tmp_path)
    check(again)
    torch.testing.assert_close(models.run(again, "llama"), models.run(model.eval(), "llama"))
