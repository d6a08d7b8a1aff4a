"""AdaMSS: clusters as scikit-learn finds them, the choice of subspaces as upstream makes it, files of other bases."""

from __future__ import annotations

import json
from types import SimpleNamespace

import models
import pytest
import torch
import trained

import peft
from peft.methods.adamss_asa import SubspaceAllocator
from peft.ops import kmeans

X = models.inputs("mlp")["x"]


def wrapped(base=None, **changes):
    """`models.Mlp` with an adapter that computes something."""
    settings = {"r": 4, "num_subspaces": 3, "target_modules": ["lin0", "lin1"], "init_weights": None}
    config = peft.AdamssConfig(**{**settings, **changes})
    return peft.get_peft_model(models.build("mlp") if base is None else base, config)


@pytest.mark.parametrize("name", trained.points())
def test_clusters_are_those_of_scikit_learn(name):
    wanted = json.loads((trained.TARGET / "kmeans.json").read_text())[name]
    points, clusters = trained.points()[name]
    answers = [wanted]
    if name == "orthogonal":
        # At equal distances the last bit decides, which OpenBLAS's kernels differ in. These are scikit-learn's answers
        # on the other kinds of processor, asked with OPENBLAS_CORETYPE.
        answers += json.loads((trained.TARGET / "kmeans_orthogonal.json").read_text()).values()
    assert kmeans.labels(points.numpy(), clusters, 10, 123456789).tolist() in answers
    assert len(set(wanted)) > 1


def test_twenty_steps_train_upstreams_subspaces():
    wanted = json.loads((trained.TARGET / "adamss.json").read_text())
    found = trained.adamss(peft, target=3)
    assert found["live"] == wanted["live"] and [len(names) // 2 for names in found["live"]] == [12, 12, 5, 3, 3]
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for key, values in wanted["values"].items():
        assert found["values"][key] == pytest.approx(values, abs=1e-5)
    for other in ({"asa_uncertainty_beta": 0.2}, {"asa_schedule_exponent": 1.0}, {"mask_interval": 8}):
        assert trained.adamss(peft, target=3, **other)["live"] != wanted["live"], "else this compares nothing"


def test_as_many_subspaces_stay_as_the_config_asks_for():
    for target in (1, 4):
        live = trained.adamss(peft, target=target)["live"]
        assert len(live[-1]) == 2 * target


def test_the_most_important_subspaces_stay():
    config = peft.AdamssConfig(use_asa=True, init_warmup=0, final_warmup=9, asa_target_subspaces=2, mask_interval=9)
    pairs = [[torch.full((2, 2), size, requires_grad=True) for _ in "AB"] for size in (1.0, 3.0, 2.0)]
    adapter = SimpleNamespace(adamss_A=[a for a, _ in pairs], adamss_B=[b for _, b in pairs])
    allocator = SubspaceAllocator(config)
    for step in range(1, 10):
        for p in (p for pair in pairs for p in pair if p.requires_grad):
            p.grad = torch.ones_like(p)
        allocator.step([adapter], step)
    assert [a.requires_grad for a, _ in pairs] == [b.requires_grad for _, b in pairs] == [False, True, True]
    assert pairs[0][0].grad is None and allocator.target(10, 3) == int(2 + 8 * (2 / 3) ** 3)


def test_the_callback_runs_the_choice_after_each_step():
    from transformers import TrainerCallback

    from peft.methods.adamss_callback import AdamssAsaCallback

    model = wrapped(use_asa=True, init_warmup=0, final_warmup=2, mask_interval=1, asa_target_subspaces=2)
    callback = AdamssAsaCallback()
    assert isinstance(callback, TrainerCallback)
    for step in (1, 2):
        model(X).square().sum().backward()
        callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
        model.zero_grad()
    assert sum(p.requires_grad for p in model.parameters()) == 4
    callback.on_optimizer_step(None, SimpleNamespace(global_step=2), None, model=models.build("mlp"))


def test_without_asa_nothing_is_frozen():
    model = wrapped(init_warmup=0, final_warmup=1, mask_interval=1, asa_target_subspaces=1)
    model(X).square().sum().backward()
    model.base_model.update_and_allocate(1)
    assert sum(p.requires_grad for p in model.parameters()) == 12


@torch.no_grad()
def test_a_file_of_other_clusters_is_refused(tmp_path):
    """Its numbers would reach other rows than those they were trained for."""
    wrapped().save_pretrained(tmp_path)
    other = models.build("mlp")
    other.lin0.weight.copy_(models.noise(other.lin0.weight.shape, 99))
    with pytest.raises(ValueError, match="rows of lin0 are clustered"):
        peft.PeftModel.from_pretrained(other, tmp_path, check_base=False)
    assert not hasattr(other, "peft_config")


@torch.no_grad()
def test_an_adapter_made_beside_a_merged_one_sees_the_base():
    fresh, model = wrapped(), wrapped()
    model.merge_adapter()
    model.add_adapter("second", model.peft_config["default"])
    first, second = (m.base_model.layers["lin0"].adapters for m in (fresh, model))
    assert torch.equal(first["default"].adamss_newB, second["second"].adamss_newB)
    assert torch.equal(first["default"].adamss_rows, second["second"].adamss_rows)


@torch.no_grad()
def test_few_rows_make_few_clusters():
    model = wrapped(num_subspaces=50, subspace_rank=9)
    layer = model.base_model.layers["lin1"]
    assert [len(B) for B in layer.adamss_B["default"]] == [1] * 5
    before = model(X)
    assert (model.merge_and_unload()(X) - before).abs().max() < 1e-5


@torch.no_grad()
def test_the_middle_factor_goes_to_either_side():
    """More rank in the clusters than singular vectors: the product with V comes first."""
    model = wrapped(num_subspaces=4, subspace_rank=3, r=4)
    adapter = model.base_model.layers["lin0"].adapters["default"]
    A, B, V = adapter.factors()
    assert len(A) > len(V) and len(adapter.low_rank().A) == 4
    torch.testing.assert_close(adapter.delta_weight(), (B @ A @ V)[:, :16])
    few = wrapped(num_subspaces=2, subspace_rank=1, r=4).base_model.layers["lin0"].adapters["default"]
    assert len(few.low_rank().A) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init_weights": True}, "init_weights"),
        ({"init_weights": "gaussian"}, "init_weights"),
        ({"r": 0}, "AdamssConfig.r "),
        ({"subspace_rank": 0}, "subspace_rank"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval"),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "final_warmup"),
        ({"use_asa": True, "asa_target_subspaces": 0}, "asa_target_subspaces"),
        ({"use_asa": True, "asa_schedule_exponent": 0.0}, "asa_schedule_exponent"),
    ],
)
def test_wrong_settings_name_the_field(settings, said):
    with pytest.raises(ValueError, match=said):
        peft.AdamssConfig(**settings)
    assert peft.AdamssConfig(init_weights=False).init_weights is None
