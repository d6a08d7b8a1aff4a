"""Which adapters the server knows, and which of them are in memory, under a budget of bytes.

An adapter in memory has a name of its own in the model ("r1", "r2", ...), never the one that clients use: a replaced
adapter is another entry, requests that run keep theirs, and the old one goes when the last of them has ended. Nothing
is ever switched: each forward says which adapter each of its rows has.

All that changes the model runs in the engine's thread, between steps; other threads read `known` and `held`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peft_run.errors import RunError
from peft_run.files import sha256

BASE = "__base__"  # the library's name for rows without an adapter
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_HEADER = 8 << 20


class AdapterRefused(RunError):
    """The files are no adapter for this base, or the name cannot be used."""


class UnknownAdapter(RunError):
    """No adapter has this name."""


class NoRoom(RunError):
    """All adapters in memory are pinned or in use, and the budget is spent."""


@dataclass(frozen=True)
class Source:
    """An adapter that can be served: where it lies, and the digest of what lay there when it was made known."""

    name: str
    path: Path
    digest: str
    nbytes: int  # in memory
    pinned: bool = False


@dataclass
class Entry:
    """An adapter in memory. `users` requests run with it."""

    source: Source
    inner: str  # its name in the model
    users: int = 0
    retired: bool = False  # replaced or removed: it goes with its last user


class Adapters:
    def __init__(self, base: nn.Module, budget: int | None = None) -> None:
        self.base = base
        self.model = base  # a PeftModel while there is an adapter
        self.budget = math.inf if budget is None else budget
        self.known: dict[str, Source] = {}
        self.held: dict[str, Entry] = {}  # by client name, least recently used first
        self.retired: list[Entry] = []
        self.loads = self.evictions = 0
        self._made = 0

    # -- for all threads ----------------------------------------------------------------------------------------------

    def source(self, name: str) -> Source:
        try:
            return self.known[name]
        except KeyError:
            raise UnknownAdapter("serve.unknown_adapter", name=name) from None

    def nbytes(self) -> int:
        """Of all adapters in memory, also of those that only wait for their last request."""
        return sum(entry.source.nbytes for entry in [*self.held.values(), *self.retired])

    # -- for the engine's thread --------------------------------------------------------------------------------------

    def add(self, source: Source) -> Entry:
        """Load an adapter. One of that name is replaced, for all requests that begin from now on."""
        entry = self._load(source)
        self._retire(source.name)
        self.known = {**self.known, source.name: source}
        self._hold(entry)
        return entry

    def learn(self, source: Source) -> None:
        """Make an adapter known without loading it; the first request does."""
        self._retire(source.name)
        self.known = {**self.known, source.name: source}

    def remove(self, name: str) -> Source:
        """Forget an adapter. Requests that run with it end as they began."""
        source = self.source(name)
        self.known = {n: s for n, s in self.known.items() if n != name}
        self._retire(name)
        return source

    def acquire(self, name: str) -> Entry:
        """The adapter, in memory, for one request; give it back with `release`."""
        source = self.source(name)
        entry = self.held.get(name)
        if entry is None:
            if digest_of(source.path) != source.digest:
                raise AdapterRefused("serve.changed_on_disk", name=name)
            entry = self._load(source)
        self._hold(entry)
        entry.users += 1
        return entry

    def release(self, entry: Entry) -> None:
        entry.users -= 1
        if entry.retired and not entry.users:
            self.retired.remove(entry)
            self._forget(entry.inner)

    def forward(self, names: Sequence[str], **inputs: Any) -> Any:
        """One forward; names[i] is the inner name of row i's adapter, or BASE."""
        if self.model is self.base:
            return self.base(**inputs)
        return self.model(adapter_names=list(names), **inputs)

    def _hold(self, entry: Entry) -> None:
        held = {n: e for n, e in self.held.items() if e is not entry}
        self.held = {**held, entry.source.name: entry}

    def _retire(self, name: str) -> None:
        entry = self.held.get(name)
        if entry is None:
            return
        self.held = {n: e for n, e in self.held.items() if e is not entry}
        if entry.users:
            entry.retired = True
            self.retired.append(entry)
        else:
            self._forget(entry.inner)

    def _load(self, source: Source) -> Entry:
        from peft import PeftModel
        from peft.errors import PeftError

        self._make_room(source)
        self._made += 1
        inner = f"r{self._made}"
        try:
            if self.model is self.base:
                model = PeftModel.from_pretrained(self.base, str(source.path), inner, strict=True)
                model.base_model.set_adapter([])  # none is active: each forward names its own
                self.model = model.eval()
            else:
                self.model.load_adapter(str(source.path), inner, strict=True)
            self._check_servable(inner)
        except (PeftError, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            self._forget(inner)
            raise AdapterRefused("serve.refused", name=source.name, problem=" ".join(str(error).split())) from error
        self.loads += 1
        return Entry(source, inner)

    def _check_servable(self, inner: str) -> None:
        """A batch must be able to mix this adapter with others. That its values are numbers the library has seen to."""
        if self.model._is_prompt_learning or getattr(self.model.peft_config[inner], "modules_to_save", None):
            raise ValueError("prompt methods and modules_to_save cannot share a batch with other adapters")
        layers = [layer for layer in self.model.base_model.layers.values() if inner in layer.adapters]
        if any(not layer.adapter_cls.by_row or layer.kind.name in ("param", "whole", "block") for layer in layers):
            raise ValueError(f"{self.model.peft_type.value} cannot share a batch with other adapters")

    def _make_room(self, source: Source) -> None:
        """Evict what was used longest ago until the adapter fits."""
        if source.nbytes > self.budget:
            raise AdapterRefused("serve.larger_than_budget", name=source.name, bytes=source.nbytes, budget=self.budget)
        replaced = self.held.get(source.name)
        for entry in [e for e in self.held.values() if not (e.users or e.source.pinned or e is replaced)]:
            if self.nbytes() + source.nbytes <= self.budget:
                return
            self.evictions += 1
            self._retire(entry.source.name)
        if self.nbytes() + source.nbytes > self.budget:
            raise NoRoom("serve.no_room", name=source.name, budget=self.budget)

    def _forget(self, inner: str) -> None:
        """Take an adapter out of the model; with the last one, the model is the base again."""
        if self.model is self.base or inner not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(inner)
        elif self.model._is_prompt_learning:
            self.model.delete_adapter(inner)
            self.model = self.base
        else:
            self.base = self.model.unload()
            self.model = self.base


def inspect(name: str, path: Path, itemsize: int, *, pinned: bool = False) -> Source:
    """What can be known of an adapter before any of it is loaded. itemsize: bytes of a number of the base's.

    Raises AdapterRefused where the name or the files cannot be right.
    """
    if not NAME.fullmatch(name) or name == BASE or set(name) <= {"."}:
        raise AdapterRefused("serve.bad_name", name=name[:80])
    for file in (CONFIG, WEIGHTS):
        if not os.path.isfile(path / file):  # not Path.is_file, which raises for a name that is too long
            raise AdapterRefused("serve.no_adapter", name=name, file=file)
    return Source(name, path, digest_of(path), size_in_memory(name, path / WEIGHTS, itemsize), pinned)


def digest_of(path: Path) -> str:
    """Of the weights and the settings, which scale them."""
    try:
        parts = [sha256(path / WEIGHTS), sha256(path / CONFIG)]
    except OSError as error:
        raise AdapterRefused("serve.no_adapter", name=path.name, file=WEIGHTS) from error
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def size_in_memory(name: str, file: Path, itemsize: int) -> int:
    """From the file's header alone. Half-precision adapters may be widened to float32 when they are loaded."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > LARGEST_HEADER:
            raise AdapterRefused("serve.broken_weights", name=name)
        try:
            header = json.loads(handle.read(length))
            tensors = [t for key, t in header.items() if key != "__metadata__"]
            return sum(math.prod(t["shape"]) for t in tensors) * max(4, itemsize)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterRefused("serve.broken_weights", name=name) from error
