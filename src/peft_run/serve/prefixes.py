"""Keys and values of beginnings that many prompts share, such as a system prompt, kept so that they are read once.

Prompts are kept in blocks. A block's key is a hash of the adapter's digest and of all tokens up to the block's end, so
a block is found only by a prompt that begins alike under the very same weights; a replaced adapter finds nothing. The
blocks used longest ago go when the budget of bytes is spent, the later ones of a prompt first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from peft_run.serve.reading import Past, cut, joined, length, nbytes

BLOCK = 32  # tokens


class Prefixes:
    """budget: bytes; 0 keeps nothing. All in the engine's thread."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.blocks: OrderedDict[bytes, Past] = OrderedDict()  # used longest ago first
        self.nbytes = 0
        self.found = 0  # tokens that need not be read again

    def find(self, digest: str, tokens: Sequence[int]) -> Past:
        """What is known of the beginning of these tokens; never all of them, since the last one makes the answer."""
        keys, parts = [], []
        for key in self._keys(digest, tokens[:-1]):
            if (block := self.blocks.get(key)) is None:
                break
            keys.append(key)
            parts.append(block)
        self._touch(keys)
        past = joined(parts)
        self.found += length(past)
        return past

    def keep(self, digest: str, tokens: Sequence[int], past: Past) -> None:
        """past: of these tokens, all of them."""
        keys = []
        for number, key in enumerate(self._keys(digest, tokens)):
            if key not in self.blocks:
                block = cut(past, number * BLOCK, (number + 1) * BLOCK)
                if self.nbytes + nbytes(block) > self.budget and not self._make_room(nbytes(block), keys):
                    break
                self.blocks[key] = block
                self.nbytes += nbytes(block)
            keys.append(key)
        self._touch(keys)

    def _make_room(self, more: int, needed: Sequence[bytes]) -> bool:
        while self.nbytes + more > self.budget:
            key = next((key for key in self.blocks if key not in needed), None)
            if key is None:
                return False
            self.nbytes -= nbytes(self.blocks.pop(key))
        return True

    def _touch(self, keys: Sequence[bytes]) -> None:
        """A prompt's first block becomes the youngest: without it, the others could not be found."""
        for key in reversed(keys):
            self.blocks.move_to_end(key)

    def _keys(self, digest: str, tokens: Sequence[int]) -> Iterator[bytes]:
        """Of each whole block."""
        key = digest.encode()
        if not self.budget:
            return
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            key = hashlib.sha256(key + array("q", tokens[end - BLOCK : end]).tobytes()).digest()
            yield key
