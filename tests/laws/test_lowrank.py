"""Laws on the fused low-rank operation: its values, its first and second gradients, its masks, over many shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import noise
from torch import nn

from peft.ops import lowrank
from peft.ops.dropout import keep_mask
from peft.ops.lowrank import LowRank

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def parts(lead, inp, out, r, *, base_bias=True, bias=False, scale=False, p=0.0, dtype=torch.float64, factor=None):
    """A frozen linear layer, an input and factors that need gradients."""
    base = nn.Linear(inp, out, bias=base_bias).to(dtype).requires_grad_(False)
    for i, t in enumerate(base.parameters()):
        t.copy_(noise(t.shape, 10 + i))
    factor = factor or dtype

    def make(shape, seed, dtype=factor):
        return noise(shape, seed).to(dtype).requires_grad_()

    x = make((*lead, inp), 1, dtype)
    row_scale = (noise((out,), 5).to(factor).abs() + 0.5).requires_grad_() if scale else None
    f = LowRank(make((r, inp), 2), make((out, r), 3), 1.7, p, make((out,), 4) if bias else None, row_scale)
    return base, x, f


def tensors_of(x, f):
    return [t for t in (x, f.A, f.B, f.bias, f.row_scale) if t is not None]


def rebuilt(f, values):
    """The factors with other tensors; returns (x, factors)."""
    x, A, B, *more = values
    bias = more.pop(0) if f.bias is not None else None
    return x, LowRank(A, B, f.s, f.dropout, bias, more.pop(0) if more else None)


def formula(base, x, f, mask=None, survivors=1.0):
    """y = c·(Wx + s·(BAx' + b')) + b, by definition."""
    xd = x if mask is None else x * mask * survivors
    y = x @ base.weight.T + f.s * (xd @ f.A.T @ f.B.T)
    if f.bias is not None:
        y = y + f.s * f.bias
    if f.row_scale is not None:
        y = y * f.row_scale
    return y if base.bias is None else y + base.bias


OPTIONS = [
    {},
    {"base_bias": False},
    {"bias": True},
    {"bias": True, "base_bias": False},
    {"scale": True},
    {"scale": True, "base_bias": False},
    {"scale": True, "bias": True},
    {"p": 0.4},
    {"p": 0.4, "scale": True},
    {"p": 0.4, "bias": True},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
shapes = pytest.mark.parametrize("lead", [(3,), (2, 2), ()], ids=str)


@options
@shapes
def test_gradients_are_right_to_second_order(options, lead):
    base, x, f = parts(lead, 4, 3, 2, **options)

    def run(*values):
        torch.manual_seed(3)  # the same mask in every call
        return lowrank.linear(base, *rebuilt(f, values))

    given_tensors = tensors_of(x, f)
    assert run(*given_tensors).grad_fn is not None
    assert torch.autograd.gradcheck(run, given_tensors)
    assert torch.autograd.gradgradcheck(run, given_tensors)
    with lowrank.exact():
        assert torch.autograd.gradcheck(run, given_tensors)
        assert torch.autograd.gradgradcheck(run, given_tensors)


@options
@shapes
def test_trained_base_bias_gets_its_gradient(options, lead):
    if options.get("base_bias") is False:
        pytest.skip("has none")
    base, x, f = parts(lead, 4, 3, 2, **options)
    base.bias.requires_grad_()

    def run(bias):
        torch.manual_seed(3)
        base._parameters["bias"] = bias
        return lowrank.linear(base, x, f)

    assert torch.autograd.gradcheck(run, [base.bias])


@few
@given(
    lead=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    inp=st.integers(1, 9),
    out=st.integers(1, 9),
    r=st.integers(1, 5),
    chosen=st.sampled_from([o for o in OPTIONS if "p" not in o]),
    grad=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]),
)
def test_values_are_those_of_the_formula(lead, inp, out, r, chosen, grad, layout):
    """Any number of leading dimensions, also of size 0, and any memory layout of the input."""
    base, x, f = parts(lead, inp, out, r, **chosen)
    if layout == "transposed" and len(lead) > 1:
        x = noise((*lead[::-1], inp), 1).double().transpose(0, len(lead) - 1).requires_grad_()
    elif layout == "strided":
        x = noise((*lead, 2 * inp), 1).double()[..., ::2].requires_grad_()
    elif layout == "expanded" and lead:
        x = noise((inp,), 1).double().expand(*lead, inp).requires_grad_()
    shape = x.shape
    with torch.set_grad_enabled(grad):
        y = lowrank.linear(base, x, f)
    wanted = formula(base, x, f)
    assert y.shape == wanted.shape and x.shape == shape
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
    plain = lowrank.add(base, base(x), x, f)
    torch.testing.assert_close(plain, wanted, atol=1e-12, rtol=1e-12)
    if grad and y.numel():
        kept = tensors_of(x, f)
        found = torch.autograd.grad(y.sin().sum(), kept)
        for a, b in zip(found, torch.autograd.grad(wanted.sin().sum(), kept)):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("factor", [torch.float32, None], ids=["fp32_factors", "half_factors"])
@options
def test_half_precision_keeps_every_dtype(dtype, factor, options):
    base, x, f = parts((5,), 8, 6, 2, dtype=dtype, factor=factor, **options)
    y = lowrank.linear(base, x, f)
    assert y.dtype is dtype
    kept = tensors_of(x, f)
    for g, t in zip(torch.autograd.grad(y.float().sum(), kept), kept):
        assert g.dtype is t.dtype and g.shape == t.shape and g.isfinite().all()
    with torch.no_grad():
        assert lowrank.linear(base, x, f).dtype is dtype
    with lowrank.exact():
        assert lowrank.linear(base, x, f).dtype is dtype


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_what_needs_no_gradient_gets_none(frozen):
    base, x, f = parts((4,), 5, 3, 2)
    names = {"x": x, "A": f.A, "B": f.B}
    names[frozen].requires_grad_(False)
    lowrank.linear(base, x, f).sum().backward()
    assert {n for n, t in names.items() if t.grad is not None} == set(names) - {frozen}
    assert all(p.grad is None for p in base.parameters())


def test_the_input_and_the_factors_are_never_written():
    for chosen in OPTIONS:
        base, x, f = parts((4,), 5, 3, 2, **chosen)
        before = [t.detach().clone() for t in [*tensors_of(x, f), *base.parameters()]]
        lowrank.linear(base, x, f).sum().backward()
        with torch.no_grad():
            lowrank.linear(base, x, f)
        assert all(torch.equal(a, b) for a, b in zip(before, [*tensors_of(x, f), *base.parameters()]))


def test_hooks_and_replaced_forwards_of_the_base_are_honoured():
    base, x, f = parts((4,), 5, 3, 2)
    seen = []
    handle = base.register_forward_hook(lambda m, a, y: seen.append(1) or y * 2)
    torch.testing.assert_close(lowrank.linear(base, x, f), formula(base, x, f) + base(x).detach() / 2)
    handle.remove()
    assert seen
    base.forward = lambda x: torch.zeros(4, 3, dtype=torch.float64)
    torch.testing.assert_close(lowrank.linear(base, x, f), f.s * (x @ f.A.T @ f.B.T))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "func_grad"])
def test_functorch_takes_plain_operations(transform):
    base, x, f = parts((4,), 5, 3, 2)

    def run(A):
        return lowrank.linear(base, x, LowRank(A, f.B, f.s))

    if transform == "vmap":
        many = torch.stack([f.A, 2 * f.A]).detach()
        wanted = torch.stack([run(a) for a in many])
        torch.testing.assert_close(torch.func.vmap(run)(many), wanted)
    elif transform == "jvp":
        _, tangent = torch.func.jvp(run, (f.A.detach(),), (torch.ones_like(f.A),))
        torch.testing.assert_close(tangent, f.s * (x @ torch.ones_like(f.A).T @ f.B.T))
    else:
        wanted = torch.autograd.grad(run(f.A).sum(), f.A)[0]
        torch.testing.assert_close(torch.func.grad(lambda a: run(a).sum())(f.A.detach()), wanted)


# -- dropout masks -----------------------------------------------------------------------------------------------
@few
@given(p=st.floats(0.0, 0.99999), seed=st.integers(0, 2**31))
def test_masks_keep_as_often_as_they_should(p, seed):
    torch.manual_seed(seed)
    shape = (101, 199)
    mask, scale = keep_mask(shape, p, torch.device("cpu"))
    n, kept = math.prod(shape), mask.double().mean().item()
    actual = 1 / scale  # p is rounded, and the scale is exact for the rounded one
    assert abs(actual - (1 - p)) <= max(0.02 * min(p, 1 - p), 2**-17)
    assert set(mask.unique().tolist()) <= {0, 1} and mask.shape == shape
    assert abs(kept - actual) <= 5 * math.sqrt(actual * (1 - actual) / n) + 1e-12
    assert abs(kept * scale - 1) <= 5 * math.sqrt((1 - actual) / actual / n) + 1e-9


@pytest.mark.parametrize("p", [0.1, 0.05, 0.5, 1 / 3])
def test_masks_are_independent(p):
    torch.manual_seed(1)
    mask, scale = keep_mask((1000, 333), p, torch.device("cpu"))
    z = mask.double() - 1 / scale
    z = z / z.std()
    sigma = 5 / math.sqrt(z.numel())
    flat = z.flatten()
    for lag in (1, 2, 3, 4, 7, 8, 16, 333):  # neighbours share a random word
        assert abs((flat[:-lag] * flat[lag:]).mean()) < sigma, lag
    assert z.mean(0).abs().max() < 6 / math.sqrt(1000) and z.mean(1).abs().max() < 6 / math.sqrt(333)
    again, _ = keep_mask((1000, 333), p, torch.device("cpu"))
    assert abs((z * (again.double() - 1 / scale) / z.std()).mean()) < sigma


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 1), (0, 4), (2, 3, 5)])
def test_masks_of_any_shape(shape):
    for p in (0.0, 0.1, 0.001, 1.0):
        mask, scale = keep_mask(shape, p, torch.device("cpu"))
        assert mask.shape == shape and math.isfinite(scale)
        if p in (0.0, 1.0):
            assert (mask == 1 - p).all()


def test_dropping_everything_leaves_the_base():
    base, x, f = parts((3, 5), 4, 3, 2, p=1.0)
    y = lowrank.linear(base, x, f)
    assert torch.equal(y, base(x))
    y.sum().backward()
    assert not f.A.grad.any() and torch.equal(x.grad, base.weight.sum(0).expand_as(x))


# -- frozen factors between trained vectors ----------------------------------------------------------------------
def vector_parts(lead, r, *, p=0.0, dtype=torch.float64, factor=None):
    """A frozen layer 4 -> 3, an input and frozen factors between vectors that need gradients."""
    base, x, f = parts(lead, 4, 3, r, dtype=dtype, factor=factor)
    inner, outer = (noise((n,), n).to(f.A.dtype).requires_grad_() for n in (r, 3))
    return base, x, LowRank(f.A.detach(), f.B.detach(), 1.7, p, inner=inner, outer=outer)


@pytest.mark.parametrize("wide", [0, 64], ids=["on_the_output", "on_B"])
@pytest.mark.parametrize("lead", [(3,), (2, 5), (), (0,)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_vectors_between_frozen_factors(lead, p, wide, monkeypatch):
    monkeypatch.setattr(lowrank, "WIDE", wide)
    base, x, f = vector_parts(lead, 2, p=p)

    def run(x, inner, outer):
        torch.manual_seed(3)
        return lowrank.linear(base, x, LowRank(f.A, f.B, f.s, p, inner=inner, outer=outer))

    tensors = (x, f.inner, f.outer)
    assert torch.autograd.gradcheck(run, tensors) and torch.autograd.gradgradcheck(run, tensors)
    y, same = run(*tensors), f.absorbed()
    if not p:
        wanted = formula(base, x, same)
        torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(lowrank.add(base, base(x), x, f), wanted, atol=1e-12, rtol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(run(*tensors), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 40])
def test_vectors_in_half_precision(rows):
    base, x, f = vector_parts((rows,), 6, dtype=torch.bfloat16, factor=torch.float32)
    y = lowrank.linear(base, x, f)
    wanted = x.double() @ base.weight.double().T + base.bias.double()
    wanted += 1.7 * ((x.double() @ f.A.double().T * f.inner.double()) @ f.B.double().T) * f.outer.double()
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, atol=0.03, rtol=0.03)
    y.sum().backward()
    assert f.inner.grad.dtype is torch.float32 and f.outer.grad.any()
