"""Prompts that are read: those of several requests in one forward, each going on from what it has read before.

    row 0   p p p p n n n |        p: read before, in earlier pieces, by another request, or learned (a prompt method)
    row 1   . . . n n n n |        n: this forward's tokens

Rows are right-aligned, so that all end in one column and a row's own columns have no gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

Past = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer the keys and values, both (heads, tokens, dim)


def length(past: Past) -> int:
    """In tokens."""
    return past[0][0].shape[1] if past else 0


def nbytes(past: Past) -> int:
    return sum(t.nbytes for pair in past for t in pair)


def cut(past: Past, start: int, end: int) -> Past:
    """The tokens from start to end, in memory of their own."""
    return [(keys[:, start:end].clone(), values[:, start:end].clone()) for keys, values in past]


def without(past: Past, count: int) -> Past:
    """All but the first tokens, as views."""
    return [(keys[:, count:], values[:, count:]) for keys, values in past]


def joined(parts: Sequence[Past]) -> Past:
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return list(parts[0]) if parts else []
    return [tuple(torch.cat(tensors, 1) for tensors in zip(*layer)) for layer in zip(*parts)]


class Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, reading: ReadCache, number: int) -> None:
        super().__init__()
        self.reading, self.number = reading, number
        self.is_initialized = True

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Nothing: the tensors are those of the forward."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values (rows, heads, new columns, dim) -> (rows, heads, all columns, dim)"""
        self.keys, self.values = self._whole(keys, 0), self._whole(values, 1)
        return self.keys, self.values

    def _whole(self, new: torch.Tensor, which: int) -> torch.Tensor:
        r = self.reading
        if not any(r.old):
            return new
        rows, heads, _, dim = new.shape
        whole = new.new_zeros(rows, heads, r.columns, dim)
        for row, (past, old, count) in enumerate(zip(r.pasts, r.old, r.new)):
            whole[row, :, r.columns - count :] = new[row, :, new.shape[2] - count :]
            if old:
                whole[row, :, r.columns - count - old : r.columns - count] = past[self.number][which]
        return whole

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.reading.columns, 0

    def get_seq_length(self) -> int:
        return self.reading.columns - max(self.reading.new)

    def get_max_length(self) -> int:
        return -1


class ReadCache(Cache):
    """The cache of one forward over `new[i]` tokens of row i, which has read `pasts[i]` before."""

    def __init__(self, pasts: Sequence[Past], new: Sequence[int], layers: int) -> None:
        super().__init__(layers=[Layer(self, number) for number in range(layers)])
        self.pasts, self.new, self.old = pasts, list(new), [length(past) for past in pasts]
        self.columns = max(max(self.new), *(old + new for old, new in zip(self.old, self.new)))

    def inputs(self, tokens: Sequence[Sequence[int]], padding: int = 0) -> dict[str, torch.Tensor]:
        """input_ids and position_ids (rows, new columns), attention_mask (rows, all columns)."""
        width = max(self.new)
        ids = [[*[padding] * (width - len(row)), *row] for row in tokens]
        places = [
            [*[0] * (width - count), *range(old, old + count)] for old, count in zip(self.old, self.new, strict=True)
        ]
        own = torch.tensor(self.old) + torch.tensor(self.new)
        mask = torch.arange(self.columns)[None] >= self.columns - own[:, None]
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor(places),
            "attention_mask": mask.long(),
        }

    def past(self, row: int) -> Past:
        """What a row has read by now. Views of the batch's tensors."""
        start = self.columns - self.old[row] - self.new[row]
        return [(la.keys[row, :, start:], la.values[row, :, start:]) for la in self.layers if la.keys is not None]
