"""FRoD's products U (S + diag d) Vᵀ and x V (S + diag d)ᵀ Uᵀ, where S is sparse and S and d are trained.

Why autograd.Functions: torch's gradient of a sparse product is dense, as large as S would be without its zeros. Here
it is computed where S has entries only.
"""

import warnings

import torch
import torch.nn.functional as F

from peft.ops import matmul
from peft.ops.sources import stamp

with warnings.catch_warnings():  # torch says once a process that these tensors are new
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], check_invariants=False)


class Places:
    """Where S has entries, sorted for products with S and with Sᵀ. indices (2, entries): row and column, any order."""

    def __init__(self, indices, size):
        row, column = indices
        self.size, self.source = size, stamp(indices)
        self.flat = row * size + column
        self.by_row, self.by_column = self.flat.argsort(), (column * size + row).argsort()
        self.forward = torch.stack([row[self.by_row], column[self.by_row]])
        self.backward = torch.stack([column[self.by_column], row[self.by_column]])
        self.ends = F.pad(torch.bincount(row, minlength=size).cumsum(0), (1, 0))

    def made_of(self, indices):
        return self.source == stamp(indices)

    def dense(self, d, values):
        """S + diag d."""
        S = torch.zeros(self.size**2, dtype=values.dtype, device=values.device).index_add(0, self.flat, values)
        return S.view(self.size, self.size) + torch.diag_embed(d)

    def times(self, h, d, values, transposed=False):
        """(S + diag d) h, or (Sᵀ + diag d) h; h (size, n)."""
        wide = h if h.dtype.itemsize >= 4 else h.float()  # sparse products know no half precision everywhere
        product = wide * d[:, None].to(wide.dtype)
        if len(values):
            order, places = (self.by_column, self.backward) if transposed else (self.by_row, self.forward)
            shape = (self.size, self.size)
            S = torch.sparse_coo_tensor(
                places, values[order].to(wide.dtype), shape, is_coalesced=True, check_invariants=False
            )
            product = torch.addmm(product, S, wide)
        return product.to(h.dtype)

    def gradients(self, q, h, again):
        """The diagonal of q hᵀ and its entries at the places of S; q and h (size, n). again: by what can be derived."""
        if again:
            product = q @ h.t()
            return product.diagonal(), product.flatten()[self.flat]
        q, h = (t if t.dtype.itemsize >= 4 else t.float() for t in (q, h))
        found = torch.empty(len(self.flat), dtype=q.dtype, device=q.device)
        if len(found):
            shape = (self.size, self.size)
            S = torch.sparse_csr_tensor(
                self.ends, self.forward[1], torch.zeros_like(found), shape, check_invariants=False
            )
            found[self.by_row] = torch.sparse.sampled_addmm(S, q, h.t(), beta=0).values()
        return torch.linalg.vecdot(q, h), found


def product(x, V, U, d, values, bias, places):
    """x V (S + diag d)ᵀ Uᵀ + bias for x (..., in): (..., out)."""
    V, U = V.to(x.dtype), U.to(x.dtype)
    if x.device.type in ("cpu", "cuda") and matmul.is_plain(x):
        return Product.apply(x, V, U, d, values, bias, places)
    return F.linear(F.linear(x @ V, places.dense(d, values).to(x.dtype)), U, bias)


class Product(torch.autograd.Function):
    """See `product`. U and V get no gradient."""

    @staticmethod
    def forward(ctx, x, V, U, d, values, bias, places):
        h = matmul.matmul(V.t(), x.reshape(-1, x.shape[-1]).t())
        ctx.save_for_backward(x, h, V, U, d, values)  # x: for second derivatives, which depend on it
        ctx.places = places
        return matmul.linear(places.times(h, d, values).t(), U, bias).view(*x.shape[:-1], len(U))

    @staticmethod
    def backward(ctx, g):
        x, h, V, U, d, values = ctx.saved_tensors
        needs_x, _, _, needs_d, needs_values, needs_bias, _ = ctx.needs_input_grad
        g, again = g.reshape(-1, g.shape[-1]), torch.is_grad_enabled()
        h = matmul.matmul(V.t(), x.reshape(-1, x.shape[-1]).t()) if again else h
        q = matmul.matmul(U.t(), g.t())
        dx = dd = dvalues = None
        if needs_x:
            q_in = ctx.places.dense(d, values).t().to(q.dtype) @ q if again else ctx.places.times(q, d, values, True)
            dx = matmul.linear(q_in.t(), V).view(x.shape)
        if needs_d or needs_values:
            dd, dvalues = ctx.places.gradients(q, h, again)
            dd, dvalues = dd.to(d.dtype), dvalues.to(values.dtype)
        return dx, None, None, dd, dvalues, g.sum(0) if needs_bias else None, None


class Weight(torch.autograd.Function):
    """U (S + diag d) Vᵀ."""

    @staticmethod
    def forward(ctx, V, U, d, values, places):
        ctx.save_for_backward(V, U)
        ctx.places = places
        return matmul.matmul(U, places.times(V.t().contiguous(), d, values))

    @staticmethod
    def backward(ctx, g):
        V, U = ctx.saved_tensors
        q = matmul.matmul(U.t(), g)
        return None, None, *ctx.places.gradients(q, V.t().contiguous(), torch.is_grad_enabled()), None
