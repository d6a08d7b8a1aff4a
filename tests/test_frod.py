"""FRoD: its sparse product and gradients, what a file's V decides, roles, and when the base weight is left out."""

from __future__ import annotations

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft.methods import frod
from peft.methods.frod_product import Places, Product, Weight, product

X = models.inputs("mlp")["x"]
FILE = "adapter_model.safetensors"


def wrapped(base=None, **changes):
    """`models.Mlp` with an adapter that computes something."""
    settings = {"sparse_rate": 0.1, "target_modules": ["lin0"], "init_weights": False}
    torch.manual_seed(0)
    return peft.get_peft_model(
        models.build("mlp") if base is None else base, peft.FrodConfig(**{**settings, **changes})
    )


def loaded(folder, base=None):
    """`models.Mlp` with the adapter of a folder."""
    return peft.PeftModel.from_pretrained(models.build("mlp") if base is None else base, folder, check_base=False)


def parts(rate, dtype=torch.float64):
    """The tensors of a product: x, V, U, d, values, bias and the places."""
    indices = frod.places_of(6, rate, torch.Generator().manual_seed(1))
    shapes = [(3, 2, 6), (6, 6), (4, 6), (6,), (indices.shape[1],), (4,)]
    x, V, U, d, values, bias = (models.noise(s, i).to(dtype) for i, s in enumerate(shapes))
    return [t.requires_grad_() for t in (x, d, values, bias)], V, U, Places(indices, 6)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_the_product_and_its_gradients_are_those_of_dense_matrices(rate):
    (x, d, values, bias), V, U, places = parts(rate)

    def fused(x, d, values, bias):
        return Product.apply(x, V, U, d, values, bias, places)

    dense = (x @ V) @ places.dense(d, values).T @ U.T + bias
    torch.testing.assert_close(fused(x, d, values, bias), dense)
    assert torch.autograd.gradcheck(fused, (x, d, values, bias))
    assert torch.autograd.gradgradcheck(fused, (x, d, values, bias))


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_the_weight_and_its_gradients_are_those_of_dense_matrices(rate):
    (_, d, values, _), V, U, places = parts(rate)
    torch.testing.assert_close(Weight.apply(V, U, d, values, places), U @ places.dense(d, values) @ V.T)
    assert torch.autograd.gradcheck(lambda d, values: Weight.apply(V, U, d, values, places), (d, values))
    assert torch.autograd.gradgradcheck(lambda d, values: Weight.apply(V, U, d**2, values**2, places), (d, values))


@pytest.mark.parametrize("grad", [False, True])
def test_many_tokens_pass_through_a_weight_that_few_do_not(grad):
    """Both ways give the same, and both gradients are the same."""
    model = wrapped()
    adapter = model.base_model.layers["lin0"].adapters["default"]
    with torch.set_grad_enabled(grad):
        limit = adapter.remakes_from
        assert limit == (3 * 24 * 16 / 8 if grad else 24)
        x = models.noise((2 * int(limit), models.WIDTH), 3)
        few, many = x[: int(limit) - 1], x
        assert adapter.instead(few) is not None and adapter.instead(many) is None
        torch.testing.assert_close(model(many)[: len(few)], model(few), atol=1e-5, rtol=1e-5)
    if grad:
        found = []
        for part in (x, *x.split(20)):
            y = model(part)
            found.append(torch.autograd.grad(y.square().sum(), list(adapter.parameters())))
        for whole, *pieces in zip(*found):
            torch.testing.assert_close(whole, sum(pieces), atol=1e-3, rtol=1e-4)


def test_half_precision_keeps_the_sparse_part_in_float32():
    (x, d, values, bias), V, U, places = parts(0.3, torch.float32)
    wanted = product(x, V, U, d, values, bias, places)
    x, bias = (t.detach().bfloat16().requires_grad_() for t in (x, bias))
    found = product(x, V, U, d, values, bias, places)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)
    found.float().sum().backward()
    assert d.grad.dtype is values.grad.dtype is torch.float32 and x.grad.dtype is torch.bfloat16


def test_places_are_off_the_diagonal_and_differ():
    for size, rate in ((5, 1.0), (9, 0.2), (1, 0.5)):
        row, column = frod.places_of(size, rate, torch.Generator().manual_seed(3))
        assert len({*zip(row.tolist(), column.tolist())}) == len(row) == min(int(size**2 * rate), size * (size - 1))
        assert (row != column).all() and row.lt(size).all() and column.lt(size).all()


@pytest.mark.parametrize(
    ("key", "role", "depth"),
    [
        ("lin0", "lin0", 7),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", 3),
        ("encoder.layer.11.attention.self.query", "self_query", 11),
        ("bert.encoder.layer.2.attention.output.dense", "attention_output", 2),
        ("bert.encoder.layer.2.output.dense", "output_dense", 2),
        ("blocks.1.layers.4.fc", "fc", 4),
        ("stack.5", "stack_5", 5),
        ("layers.norm.0", "norm_0", 0),
        ("layers", "layers", 7),
    ],
)
def test_roles_and_depths(key, role, depth):
    assert frod.role_of(key) == role and frod.depth_of(key, 7) == depth


@torch.no_grad()
def test_a_file_with_v_is_loaded_without_decomposing_anything_again(tmp_path, monkeypatch):
    model = wrapped()
    before = model(X)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(frod, "basis", None)
    torch.testing.assert_close(loaded(tmp_path)(X), before)


@torch.no_grad()
def test_u_follows_the_v_of_the_file(tmp_path):
    """Another machine may find eigenvectors of other signs; U, which no file holds, must be solved with the same V."""
    model = wrapped()
    before = model(X)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    signs = torch.where(torch.arange(16) % 3 == 0, -1.0, 1.0)
    tensors["base_model.frod_V.lin0"] *= signs
    row, column = tensors["base_model.frod_s_indices.lin0"]
    tensors["base_model.model.lin0.frod_lambda_s_values"] *= signs[row] * signs[column]
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    torch.testing.assert_close(loaded(tmp_path)(X), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_base_weight_counts_when_it_changes():
    """U and V make the weight that the base had; one that was changed since is used itself."""
    model = wrapped()
    before, layer = model(X), model.base_model.layers["lin0"]
    adapter = layer.adapters["default"]
    assert adapter.instead(X) is not None
    layer.get_base_layer().weight.add_(0.1)
    assert adapter.instead(X) is None
    assert (model(X) - before).abs().max() > 1e-2
    merged = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), merged, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_base_layer_need_not_be_called(monkeypatch):
    model = wrapped()
    wanted = model(X)
    monkeypatch.setattr(frod.Frod, "instead", lambda self, x: None)
    torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)


def test_layers_of_a_role_share_v_and_adapters_share_u():
    model = peft.get_peft_model(models.llama(), peft.FrodConfig(target_modules=["q_proj"], sparse_rate=0.1))
    first, second = model.base_model.layers.values()
    assert first.adapters["default"].frod_V is second.adapters["default"].frod_V
    model.add_adapter("more", peft.FrodConfig(target_modules=["q_proj"], sparse_rate=0.2))
    assert first.adapters["more"].frod_U is first.adapters["default"].frod_U
    sizes = {n: len(first.frod_lambda_s_values[n]) for n in ("default", "more")}
    assert sizes == {"default": 25, "more": 51}, "each adapter has the places that its own config asks for"


@torch.no_grad()
def test_without_sparse_places_only_the_diagonal_is_trained(tmp_path):
    model = wrapped(sparse_rate=0.0)
    before = model(X)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tmp_path)(X), before)


def test_a_file_without_v_must_say_so(tmp_path):
    wrapped().save_pretrained(tmp_path)
    tensors = {k: t for k, t in load_file(tmp_path / FILE).items() if "frod_V" not in k and "frod_s" not in k}
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match="save_projection=False"):
        loaded(tmp_path)


@pytest.mark.parametrize("value", [-1, 16, 1 << 40])
def test_places_outside_of_s_are_refused(tmp_path, value):
    wrapped().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["base_model.frod_s_indices.lin0"][0, 0] = value
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match="outside of S"):
        loaded(tmp_path)


def test_one_role_has_one_width():
    class Tower(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.fc = nn.Linear(width, 8)

    base = nn.ModuleDict({"a": nn.ModuleDict({"x": Tower(4)}), "b": nn.ModuleDict({"x": Tower(6)})})
    with pytest.raises(ValueError, match=r"'x_fc', but their inputs have \[4, 6\]"):
        peft.get_peft_model(base, peft.FrodConfig(target_modules=["fc"]))


@pytest.mark.parametrize("field", ["projection_prng_key", "save_projection"])
def test_adapters_of_a_model_agree_on_their_projections(field):
    other = {"projection_prng_key": 3, "save_projection": False}[field]
    with pytest.raises(ValueError, match=f"the same {field}"):
        wrapped().add_adapter("other", peft.FrodConfig(target_modules=["lin0"], **{field: other}))


@pytest.mark.parametrize(
    ("field", "value"), [("sparse_rate", 2.0), ("frod_dropout", -0.1), ("regularization_alpha", -1.0), ("bias", "x")]
)
def test_wrong_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        peft.FrodConfig(**{field: value})
