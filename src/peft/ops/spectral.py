"""x times a weight of few trained numbers: entries of it (wavelets of few taps), or of its Fourier transform.

The weight is never formed. The product with its entries, or with those of its transform, is `embedding_bag`: row u of
the result is the sum of the rows v of x that its entries name, weighted by their values. It wants features first and
rows of x last, so x is transposed, or transformed, before and after; each costs a fraction of a product with W.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


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
    """Where the entries of a weight of `shape` (out, in) lie. fourier: entries of its transform, see `waves`."""

    def __init__(self, rows, cols, shape, fourier):
        self.rows, self.cols, self.shape, self.fourier = rows, cols, shape, fourier
        self.copies = {}

    def on(self, device):
        """Itself on a device; a copy is made once."""
        if self.rows.index.device == device:
            return self
        if device not in self.copies:
            rows, cols = (Side(*(t.to(device) for t in side)) for side in (self.rows, self.cols))
            self.copies[device] = Layout(rows, cols, self.shape, self.fourier)
        return self.copies[device]

    @property
    def T(self):
        return Layout(self.cols, self.rows, self.shape[::-1], self.fourier)

    def forward(self, x):
        """x (T, n) -> features first: (n, T), or real and imaginary parts of its transform, (2 · (n // 2 + 1), T)."""
        if not self.fourier:
            return x.t().contiguous()
        return torch.view_as_real(torch.fft.rfft(x)).permute(2, 1, 0).reshape(-1, len(x))

    def back(self, h):
        """The transpose of `forward`, but for the weights of the entries: features first -> (T, out)."""
        if not self.fourier:
            return h.t()
        waves = torch.view_as_complex(h.view(2, len(h) // 2, -1).permute(2, 1, 0).contiguous())
        return torch.fft.irfft(waves, n=self.shape[0], norm="forward")


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
        elif needs_values:  # embedding_bag's own gradient is ten times faster than that
            with torch.enable_grad():
                v = values.detach().requires_grad_()
                h = _bags(side, side.factor, layout.forward(x.detach()), v)
            dvalues = torch.autograd.grad(h, v, G)[0]
        return dx, dvalues, None


def pays(count, shape):
    """Whether so few entries, in a weight of this shape, make the product cheaper than one with the weight itself."""
    return 32 * count <= shape[0] * shape[1]


def output(x, values, layout):
    """x (..., in) times the weight; computed in float32 at least."""
    layout = layout.on(x.device)
    x2 = x.reshape(-1, x.shape[-1])
    x2 = x2 if x2.dtype.itemsize >= 4 else x2.float()
    values = values.to(x2.dtype)
    y = _plain(x2, values, layout) if torch.compiler.is_compiling() else Product.apply(x2, values, layout)
    return y.view(*x.shape[:-1], y.shape[-1])


# -- layouts -----------------------------------------------------------------------------------------------------
def entries(rows, cols, value, factor, shape):
    """The layout of a weight whose entries (rows, cols) are values[value] * factor, added up."""
    out, inp = shape
    one = torch.ones_like(factor)
    return Layout(
        _side(rows, cols, value, factor, one, out), _side(cols, rows, value, factor, one, inp), shape, fourier=False
    )


def waves(rows, cols, shape):
    """The layout of a weight W[o, i] = Σ values · cos 2π(o · rows / out + i · cols / in): cos·cos - sin·sin."""
    (out, inp), n = shape, len(rows)
    (u, sign_u, once_u), (v, sign_v, once_v) = _fold(rows, out), _fold(cols, inp)
    u, v = torch.cat([u, u + out // 2 + 1]), torch.cat([v, v + inp // 2 + 1])  # sines after cosines
    value, factor = torch.arange(n).repeat(2), torch.cat([torch.ones(n), -sign_u * sign_v])
    return Layout(
        _side(u, v, value, factor, once_u.repeat(2), 2 * (out // 2 + 1)),
        _side(v, u, value, factor, once_v.repeat(2), 2 * (inp // 2 + 1)),
        shape,
        fourier=True,
    )


def _fold(u, n):
    """Frequencies of n as ones of the lower half; the sign of their sines; a half for all that `irfft` counts twice."""
    half = torch.minimum(u, n - u)
    return half, torch.where(2 * u > n, -1.0, 1.0), torch.where((half == 0) | (2 * half == n), 1.0, 0.5)


def _side(bag, index, value, factor, weight, size):
    order = bag.argsort(stable=True)
    bag, index = bag[order].int(), index[order].int()
    starts = torch.searchsorted(bag, torch.arange(size, dtype=torch.int32)).int()
    return Side(index, bag, starts, value[order], factor[order], (factor * weight)[order])
