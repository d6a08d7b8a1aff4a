"""x times a weight of few trained numbers: entries of it, or of its Fourier or wavelet transform.

The weight is never formed. The product with its entries, or with those of its transform, is `embedding_bag`: row u of
the result is the sum of the rows v of x that its entries name, weighted by their values. It wants features first and
rows of x last, so x is transposed, or transformed, before and after; each costs a fraction of a product with W.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from peft.ops import bases


class Side(NamedTuple):
    """The entries in the order of their rows (or, the other side, of their columns); all tensors but starts (entries,).

    index: the column of each. bag: its row. starts (rows,): where each row begins. value: which of the trained numbers
    it is a multiple of. factor: what multiple. weight: the same, times what the transform back needs.
    """

    index: torch.Tensor
    bag: torch.Tensor
    starts: torch.Tensor
    value: torch.Tensor
    factor: torch.Tensor
    weight: torch.Tensor


class Layout:
    """Where the entries of a weight of `shape` (out, in) lie, or those of its transform in a basis on both sides."""

    def __init__(self, basis, rows, cols, shape):
        self.basis, self.rows, self.cols, self.shape = basis, rows, cols, shape
        self.copies = {}

    def on(self, device):
        """Itself on a device; a copy is made once."""
        if self.rows.index.device == device:
            return self
        if device not in self.copies:
            rows, cols = (Side(*(t.to(device) for t in side)) for side in (self.rows, self.cols))
            self.copies[device] = Layout(self.basis, rows, cols, self.shape)
        return self.copies[device]

    @property
    def T(self):
        return Layout(self.basis, self.cols, self.rows, self.shape[::-1])

    def forward(self, x):
        return self.basis.forward(x)

    def back(self, h):
        return self.basis.back(h, self.shape[0])

    def dense(self, values):
        """The weight itself, for entries that have no weights of their own."""
        side, (out, inp) = self.rows, self.shape
        S = values.new_zeros(self.basis.rows(out), self.basis.rows(inp))
        S = S.index_put((side.bag, side.index), values[side.value] * side.factor, accumulate=True)
        return self.basis.back(self.basis.back(S, out), inp)


def _bags(side, multiples, X, values):
    return F.embedding_bag(side.index, X, side.starts, mode="sum", per_sample_weights=values[side.value] * multiples)


def _plain(x, values, layout):
    return layout.back(_bags(layout.rows, layout.rows.weight, layout.forward(x), values))


class Product(torch.autograd.Function):
    """x (T, in), values (n,) -> (T, out); keeps only x. Its gradient of x is the product with the transpose."""

    @staticmethod
    def forward(ctx, x, values, layout):
        ctx.save_for_backward(x, values)
        ctx.layout = layout
        return _plain(x, values, layout)

    @staticmethod
    def backward(ctx, g):
        (x, values), layout = ctx.saved_tensors, ctx.layout
        needs_x, needs_values, _ = ctx.needs_input_grad
        again, side, dx, dvalues = torch.is_grad_enabled(), layout.rows, None, None
        G = None if again else layout.forward(g)
        if needs_x and again:
            dx = Product.apply(g, values, layout.T)
        elif needs_x:
            dx = layout.T.back(_bags(layout.cols, layout.cols.weight, G, values))
        if needs_values and again:
            dots = (layout.forward(g)[side.bag] * layout.forward(x)[side.index]).sum(1)
            dvalues = torch.zeros_like(values).index_add(0, side.value, dots * side.factor)
        elif needs_values:  # what embedding_bag's own backward calls, without its forward
            dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                G, layout.forward(x), side.index, side.starts, side.bag, mode=0
            )
            dvalues = torch.zeros_like(values).index_add_(0, side.value, dots * side.factor)
        return dx, dvalues, None


def pays(count, shape, least=32):
    """Whether so few entries, one in `least` or fewer, make the product cheaper than one with the weight itself."""
    return least * count <= shape[0] * shape[1]


def output(x, values, layout):
    """x (..., in) times the weight; computed in float32 at least."""
    layout = layout.on(x.device)
    x2 = x.reshape(-1, x.shape[-1])
    x2 = x2 if x2.dtype.itemsize >= 4 else x2.float()
    values = values.to(x2.dtype)
    y = _plain(x2, values, layout) if torch.compiler.is_compiling() else Product.apply(x2, values, layout)
    return y.view(*x.shape[:-1], y.shape[-1])


# -- layouts -----------------------------------------------------------------------------------------------------
def entries(rows, cols, shape):
    """The layout of a weight whose entries (rows, cols) are the values."""
    return _layout(bases.Plain(), rows, cols, shape)


def waves(rows, cols, shape):
    """The layout of a weight W[o, i] = Σ values · cos 2π(o · rows / out + i · cols / in): cos·cos - sin·sin."""
    (out, inp), n = shape, len(rows)
    (u, sign_u, once_u), (v, sign_v, once_v) = _fold(rows, out), _fold(cols, inp)
    u, v = torch.cat([u, u + out // 2 + 1]), torch.cat([v, v + inp // 2 + 1])  # sines after cosines
    value, factor = torch.arange(n).repeat(2), torch.cat([torch.ones(n), -sign_u * sign_v])
    basis, once = bases.Fourier(), (once_u.repeat(2), once_v.repeat(2))
    return _layout(basis, u, v, shape, value, factor, once)


def wavelets(rows, cols, shape, family):
    """The layout of a weight that has the values at (rows, cols) of the four quadrants of its wavelet transform.

    On the left, rows are of the low band; on top, columns are: each side's half says the band of the other side. The
    quadrants are those of a matrix with a margin around it, which boundaries take up.
    """
    basis = bases.wavelet(family)
    (row, below), (col, right) = (_halved(k + basis.margin, basis.half(n)) for k, n in zip((rows, cols), shape))
    return _layout(basis, basis.index(row, right), basis.index(col, below), shape)


def _halved(k, half):
    """k as a place in its half, and 1 for the second half, else 0."""
    second = (k >= half).long()
    return k - second * half, second


def _layout(basis, u, v, shape, value=None, factor=None, once=None):
    """value: which of the values an entry is a multiple of; factor: what multiple; once: weights of u and of v."""
    value = torch.arange(len(u)) if value is None else value
    factor = torch.ones(len(u)) if factor is None else factor
    weight_u, weight_v = (factor, factor) if once is None else (factor * once[0], factor * once[1])
    return Layout(
        basis,
        _side(u, v, value, factor, weight_u, basis.rows(shape[0])),
        _side(v, u, value, factor, weight_v, basis.rows(shape[1])),
        shape,
    )


def _fold(u, n):
    """Frequencies of n as ones of the lower half; the sign of their sines; a half for all that `irfft` counts twice."""
    half = torch.minimum(u, n - u)
    return half, torch.where(2 * u > n, -1.0, 1.0), torch.where((half == 0) | (2 * half == n), 1.0, 0.5)


def _side(bag, index, value, factor, weight, size):
    order = bag.argsort(stable=True)
    bag, index = bag[order].int(), index[order].int()
    starts = torch.searchsorted(bag, torch.arange(size, dtype=torch.int32)).int()
    return Side(index, bag, starts, value[order], factor[order], weight[order])
