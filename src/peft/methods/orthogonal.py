"""What OFT, BOFT, HRA and PSOFT share: orthogonal matrices from skew-symmetric ones, rotations of a layer's input."""

import math
import warnings

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.errors import ConfigError
from peft.layers.kind import bare

WIDE = 16  # many tiny blocks are multiplied faster as fewer blocks of this size


class Skew(nn.Module):
    """Skew-symmetric matrices as what stands above their diagonals: weight (count, n(n-1)/2), row by row."""


def skew_module(count, n, **where):
    return bare(Skew, {}, weight=torch.empty(count, n * (n - 1) // 2, **where))


def skew(v, n):
    """(count, n(n-1)/2) -> (count, n, n), skew-symmetric."""
    row, column = torch.triu_indices(n, n, 1, device=v.device)
    upper = v.new_zeros(len(v), n * n).index_copy(1, row * n + column, v).view(-1, n, n)
    return upper - upper.mT


def orthogonal(Q, c):
    """Orthogonal matrices from skew-symmetric ones, in the way that the config asks for."""
    return cayley_neumann(Q, c.num_cayley_neumann_terms) if c.use_cayley_neumann else cayley(Q)


def cayley(Q):
    """(I - Q)(I + Q)⁻¹, orthogonal for skew-symmetric Q; in float32 or better."""
    Q32 = Q if Q.dtype == torch.float64 else Q.float()
    eye = torch.eye(Q.shape[-1], dtype=Q32.dtype, device=Q.device)
    return torch.linalg.solve(eye + Q32, eye - Q32, left=False).to(Q.dtype)


def cayley_neumann(Q, terms):
    """I + 2Q + 2Q² + … + Qᵏ of `terms` terms, nearly (I + Q)(I - Q)⁻¹: the inverse of what `cayley` gives.

    Files are written for either, so the two keep their directions. The last term counts once; three terms mean four.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms < 3:
        return eye if terms < 2 else eye + 2 * Q
    inner = torch.add(eye, Q, alpha=0.5)
    for _ in range(max(terms, 4) - 3):
        inner = torch.baddbmm(eye, Q, inner)
    return torch.baddbmm(eye, Q, inner, alpha=2)


def orthonormal_rows(P):
    """What Gram-Schmidt makes of the rows of P (…, r, n), r ≤ n, in float32 or better: P itself, if they are that."""
    exact = P if P.dtype == torch.float64 else P.float()
    Q, T = torch.linalg.qr(exact.mT)
    signs = torch.where(T.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)  # LAPACK leaves them open
    return (Q * signs.unsqueeze(-2)).mT.to(P.dtype)


def rotate_blocks(x, R):
    """Row vectors x (…, k·b) times k blocks R (k, b, b); one block (1, b, b) serves all."""
    k, b, _ = R.shape
    if k == 1:
        return (x.reshape(-1, b) @ R[0]).view(x.shape)
    R = widened(R)
    k, b, _ = R.shape
    return torch.bmm(x.reshape(-1, k, b).transpose(0, 1), R).transpose(0, 1).reshape(x.shape)


def widened(R):
    """The same block-diagonal matrix in fewer blocks, where they are tiny."""
    k, b, _ = R.shape
    m = [m for m in range(1, max(WIDE // b, 1) + 1) if k % m == 0][-1]
    if m == 1:
        return R
    places = torch.eye(m, dtype=R.dtype, device=R.device).view(m, 1, m, 1)
    return (R.view(-1, m, b, 1, b) * places).reshape(-1, m * b, m * b)


def nearest_divisor(n, wanted, field, key):
    """The divisor of n that is nearest to `wanted`, with a warning if that is another number; ties go down."""
    found = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
    if found != wanted:
        warnings.warn(f"{field}={wanted} does not divide the {n} inputs of {key}: it gets {found}.", stacklevel=2)
    return found


class Rotation(Adapter):
    """An adapter that turns the rows of x, or of W, by an orthogonal matrix M: y = (x M) Wᵀ, so W' = W Mᵀ.

    Linear layers and pointwise convolutions get a turned input, embeddings a turned output. A larger kernel reads
    patches that overlap, which no change of x can turn one by one: there the weight is turned instead.
    """

    kinds = ("linear", "conv")
    parallel = False

    def refuse_groups(self):
        if getattr(self.base, "groups", 1) > 1:
            raise ConfigError(
                f"{type(self).__name__} cannot adapt {self.key}: it is a convolution with groups, whose kernels do not "
                "read all inputs. Leave it out of target_modules."
            )

    def turn(self, x, back=False):
        """x M for row vectors x (…, width); with back=True x Mᵀ."""
        raise NotImplementedError

    @property
    def width(self):
        """The number of dimensions in which M turns."""
        out, *rest = self.layer.shape
        return out if self.kind.name == "embedding" else math.prod(rest)

    @property
    def by_input(self):
        return self.kind.name != "embedding" and self.width == self.layer.shape[1]

    def input(self, x):
        if not self.by_input:
            return x
        if self.kind.name == "conv":
            return self.turn(x.movedim(1, -1)).movedim(-1, 1)
        return self.turn(x)

    def output(self, x, y):
        if self.kind.name == "embedding":
            return self.turn(y)
        return y if self.by_input else self.through(x, self.base_weight())

    def beside(self, x, y, y0):
        if self.by_input or self.kind.name == "embedding":
            return self.output(x, y)
        return self.through(x, self.layer.weight_before(self))

    def through(self, x, W):
        """The layer's output with the weight that this adapter makes of W."""
        y = self.layer.op(x, self.merged_weight(W).to(x.dtype))
        bias = getattr(self.base, "bias", None)
        return y if bias is None else y + self.kind.per_out(bias)

    def merged_weight(self, W):
        if self.kind.name == "embedding":
            return self.turn(W.T).T
        return self.turn(W.flatten(1), back=True).view_as(W)
