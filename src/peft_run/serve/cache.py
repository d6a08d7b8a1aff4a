"""Keys and values of all running requests: one row each, right-aligned, so that every row writes the same column.

    row 0   . . . a a a a |        A row joins with the keys of its prompt and leaves by handing its place to the
    row 1   b b b b b b b |        last one. Columns that no row needs any more are dropped when room runs out.
                          ^ column

Buffers are (rows, heads, columns, dim) for each layer, longer than what is in use, so a step copies nothing.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from peft_run.serve.reading import Past, length

ROOM = 64  # columns that a buffer grows by, at least


class Layer(CacheLayerMixin):
    """One layer's buffers. `update` writes a step's keys, and gives all that are in use."""

    is_sliding = False

    def __init__(self, slots: SlotCache, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.slots = slots
        self.keys, self.values = (t.new_zeros(slots.capacity, t.shape[0], 0, t.shape[2]) for t in like)
        self.is_initialized = True

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Nothing: the buffers are made when the first row joins."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values (rows, heads, 1, dim) -> (rows, heads, columns in use, dim)"""
        s = self.slots
        self.keys[: s.rows, :, s.column] = keys[:, :, 0]
        self.values[: s.rows, :, s.column] = values[:, :, 0]
        used = slice(s.start, s.column + 1)
        return self.keys[: s.rows, :, used], self.values[: s.rows, :, used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots.column - self.slots.start

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    def __init__(self, rows: int) -> None:
        super().__init__(layers=[])
        self.capacity = rows
        self.rows = 0
        self.column = 0  # where the next step writes; all rows end just before it
        self.lengths: list[int] = []  # of each row: how many columns before `column` are its own

    @property
    def start(self) -> int:
        """The first column that some row uses."""
        return self.column - self._used()

    def join(self, prompt: Past) -> int:
        """Take over the keys of a prompt that was read; returns its row."""
        count = length(prompt)
        if not self.layers:
            self.layers = [Layer(self, like) for like in prompt]
        if count > self.column:
            self._end_at(max(count, self._used()))
        row, own = self.rows, slice(self.column - count, self.column)
        for mine, its in zip(self.layers, prompt):
            for buffer, tensor in zip((mine.keys, mine.values), its):
                buffer[row, :, : own.start] = 0  # what another request left there may be infinite, and 0 * inf is not 0
                buffer[row, :, own] = tensor
        self.rows += 1
        self.lengths.append(count)
        return row

    def leave(self, row: int) -> None:
        """Free a row. The last row moves into its place."""
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                for buffer in (layer.keys, layer.values):
                    buffer[row, :, : self.column] = buffer[last, :, : self.column]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.rows = last

    def before_step(self) -> torch.Tensor:
        """Room for one more column; returns the attention mask (rows, columns in use and the new one)."""
        if self.column == self.size:
            self._end_at(self._used())
        width = self.column - self.start + 1
        own = torch.tensor(self.lengths)[:, None] + 1
        return (torch.arange(width)[None] >= width - own).long()

    def after_step(self) -> None:
        self.column += 1
        self.lengths = [n + 1 for n in self.lengths]

    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def _used(self) -> int:
        return max(self.lengths, default=0)

    @property
    def size(self) -> int:
        return self.layers[0].keys.shape[2] if self.layers else 0

    def _end_at(self, column: int) -> None:
        """Move the columns in use so that they end at `column`, in longer buffers where these are almost full."""
        used, size = self._used(), self.size
        if column > 0.75 * size:
            size = 2 * column + ROOM
        elif not used:
            self.column = column
            return
        for layer in self.layers:
            layer.keys, layer.values = (
                self._moved(buffer, used, column, size) for buffer in (layer.keys, layer.values)
            )
        self.column = column

    def _moved(self, old: torch.Tensor, used: int, column: int, size: int) -> torch.Tensor:
        new = old.new_zeros(self.capacity, old.shape[1], size, old.shape[3])
        new[: self.rows, :, column - used : column] = old[: self.rows, :, self.column - used : self.column]
        return new
