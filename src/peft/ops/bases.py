"""Linear maps of features, and their transposes, for `ops/spectral.py`. Transformed features come first, rows last."""

import torch
import torch.nn.functional as F

from peft.ops.remembered import remembered
from peft.ops.wavelets import filters

BLOCK = 16  # features, or rows, that one small product with a filter makes at once


class Plain:
    """The features themselves."""

    def rows(self, n):
        """How many rows n features become."""
        return n

    def forward(self, x):
        """x (T, n) -> (rows(n), T)."""
        return x.t().contiguous()

    def back(self, h, n):
        """The transpose of `forward`, but for the weights of entries: h (rows(n), T) -> (T, n)."""
        return h.t().contiguous()


class Fourier(Plain):
    """The lower half of the spectrum: real parts, then imaginary ones."""

    def rows(self, n):
        return 2 * (n // 2 + 1)

    def forward(self, x):
        return torch.view_as_real(torch.fft.rfft(x)).permute(2, 1, 0).reshape(-1, len(x))

    def back(self, h, n):
        waves = torch.view_as_complex(h.view(2, len(h) // 2, -1).permute(2, 1, 0).contiguous())
        return torch.fft.irfft(waves, n=n, norm="forward")


class Wavelet(Plain):
    """One level of a wavelet transform, zeros beyond both ends.

    With filters of L = 2 · margin + 2 taps, number k of the low and of the high band weighs the L features from
    2 · (k - margin) on. BLOCK rows hold BLOCK / 2 numbers of the low band, then those of the high. So a window of
    features makes a block of rows, and a window of rows a block of features, always with one Toeplitz matrix: both
    directions are a batch of small products.
    """

    def __init__(self, family):
        self.filters = filters(family)
        self.margin = len(self.filters[0]) // 2 - 1
        self.kept = {}

    def half(self, n):
        """How many numbers of each band n features are made of."""
        return (n + 1) // 2 + self.margin

    def rows(self, n):
        return BLOCK * (_blocks(n) + _blocks(2 * self.margin))

    def index(self, k, high):
        """The row of number k of the high band (high=1) or the low one (high=0); tensors."""
        half = BLOCK // 2
        return k // half * BLOCK + high * half + k % half

    def forward(self, x):
        left, right = 2 * self.margin, self.rows(x.shape[1]) - x.shape[1]
        x = F.pad(x, (left, right)) if left or right else x
        windows = x.unfold(1, BLOCK + left, BLOCK).permute(1, 2, 0)  # (blocks, window, T)
        return torch.bmm(self._matrices(x)[0].expand(len(windows), -1, -1), windows).flatten(0, 1)

    def back(self, h, n):
        matrix = self._matrices(h)[1]
        windows = h.unfold(0, matrix.shape[1], BLOCK)  # (blocks, T, window)
        return torch.bmm(windows, matrix.expand(len(windows), -1, -1)).transpose(0, 1).flatten(1)[:, :n]

    def _matrices(self, like):
        """(1, BLOCK, window of features) for `forward`, (1, window of rows, BLOCK) for `back`."""
        key = like.device, like.dtype
        if key in self.kept:
            return self.kept[key]
        span = 2 * self.margin
        there = self._weights(torch.arange(BLOCK), torch.arange(-span, BLOCK))
        back = self._weights(torch.arange(BLOCK * (1 + _blocks(span))), torch.arange(BLOCK))
        made = [m.to(*key)[None] for m in (there, back)]
        if not torch.compiler.is_compiling():  # what a compiler traces is no real tensor
            self.kept[key] = made
        return made

    def _weights(self, rows, features):
        """(rows, features): what each row weighs each feature with, float64."""
        half, taps = BLOCK // 2, torch.tensor(self.filters, dtype=torch.float64)  # (2, L)
        number, band = rows // BLOCK * half + rows % half, rows % BLOCK // half
        tap = features - 2 * (number[:, None] - self.margin)
        inside = (tap >= 0) & (tap < taps.shape[1])
        return torch.where(inside, taps[band[:, None], tap.clamp(0, taps.shape[1] - 1)], 0.0)


@remembered
def wavelet(family):
    """The basis of a family; one object, so that its matrices are made once."""
    return Wavelet(family)


def _blocks(n):
    return -(-n // BLOCK)
