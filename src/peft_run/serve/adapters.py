"""Which adapters the server knows, and which of them are in memory, under a budget of bytes.

An adapter in memory has a name of its own in the model ("r1", "r2", ...), never the one that clients use: a replaced
adapter is another entry, requests that run keep theirs, and the old one goes when the last of them has ended. Nothing
is ever switched: each forward says which adapter each of its rows has.

A prompt method adapts no layer. Its virtual tokens come to be keys and values once, when it is loaded, and each of its
requests begins behind them; in the model its rows are the base's.

All that changes the model runs in the engine's thread, between steps; other threads read `known` and `held`.
"""

from __future__ import annotations

import hashlib
import inspect as signatures
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from peft_run.errors import RunError
from peft_run.files import sha256
from peft_run.serve.reading import Past, nbytes

BASE = "__base__"  # the library's name for rows without an adapter
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_HEADER, LARGEST_JSON = 8 << 20, 1 << 20  # bytes


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
    virtual: int = 0  # tokens in front of each prompt
    pinned: bool = False


@dataclass
class Entry:
    """An adapter in memory. `users` requests run with it."""

    source: Source
    inner: str = BASE  # its name in the model
    first: Past = field(default_factory=list)  # a prompt method's virtual tokens
    users: int = 0
    retired: bool = False  # replaced or removed: it goes with its last user

    @property
    def nbytes(self) -> int:
        return nbytes(self.first) or self.source.nbytes


class Adapters:
    def __init__(self, base: nn.Module, budget: int | None = None) -> None:
        self.base = base
        self.model = base  # a PeftModel while there is an adapter
        self.largest = sum(p.nbytes for p in base.parameters())  # more than the base itself is no adapter
        self.budget = math.inf if budget is None else budget
        self.known: dict[str, Source] = {}
        self.held: dict[str, Entry] = {}  # by client name, least recently used first
        self.retired: list[Entry] = []
        self.loads = self.evictions = 0
        self._made = 0
        names = signatures.signature(base.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

    # -- for all threads ----------------------------------------------------------------------------------------------

    def source(self, name: str) -> Source:
        try:
            return self.known[name]
        except KeyError:
            raise UnknownAdapter("serve.unknown_adapter", name=name) from None

    def nbytes(self) -> int:
        """Of all adapters in memory, also of those that only wait for their last request."""
        return sum(entry.nbytes for entry in [*self.held.values(), *self.retired])

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

    @torch.inference_mode()
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
        from peft import PeftConfig

        try:
            config = PeftConfig.from_pretrained(str(source.path))
            if getattr(config, "modules_to_save", None):
                raise ValueError("modules_to_save cannot share a batch with other adapters")
            if config.is_prompt_learning and config.num_virtual_tokens != source.virtual:  # before memory is taken
                raise ValueError(f"num_virtual_tokens is {config.num_virtual_tokens}, the file has {source.virtual}")
            entry = self._load_prompt(source) if config.is_prompt_learning else self._load_layers(source)
        except Exception as error:  # whatever hostile files make the loader raise
            if isinstance(error, RunError):
                raise
            raise AdapterRefused("serve.refused", name=source.name, problem=" ".join(str(error).split())) from error
        self.loads += 1
        return entry

    def _load_layers(self, source: Source) -> Entry:
        from peft import PeftModel

        self._make_room(source, source.nbytes)
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
        except BaseException:
            self._forget(inner)
            raise
        return Entry(source, inner)

    def _load_prompt(self, source: Source) -> Entry:
        from peft import PeftModel

        prompt = PeftModel.from_pretrained(self.base, str(source.path), strict=True).eval().get_prompt(1)
        if isinstance(prompt, torch.Tensor):  # embeddings (1, virtual tokens, dim)
            cache = DynamicCache()
            settings = {self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
            self.forward([BASE], inputs_embeds=prompt, **settings)
        else:
            cache = prompt
        first = [(layer.keys[0].detach().clone(), layer.values[0].detach().clone()) for layer in cache.layers]
        self._make_room(source, nbytes(first))
        return Entry(source, first=first)

    def _check_servable(self, inner: str) -> None:
        """A batch must be able to mix this adapter with others. That its values are numbers the library has seen to."""
        layers = [layer for layer in self.model.base_model.layers.values() if inner in layer.adapters]
        if any(not layer.adapter_cls.by_row or layer.kind.name in ("param", "whole", "block") for layer in layers):
            raise ValueError(f"{self.model.peft_type.value} cannot share a batch with other adapters")

    def _make_room(self, source: Source, more: int) -> None:
        """Evict what was used longest ago until `more` bytes fit."""
        largest = min(self.largest, self.budget)
        if more > largest:
            raise AdapterRefused("serve.larger_than_budget", name=source.name, bytes=more, budget=largest)
        replaced = self.held.get(source.name)
        for entry in [e for e in self.held.values() if not (e.users or e.source.pinned or e is replaced)]:
            if self.nbytes() + more <= self.budget:
                return
            self.evictions += 1
            self._retire(entry.source.name)
        if self.nbytes() + more > self.budget:
            raise NoRoom("serve.no_room", name=source.name, budget=self.budget)

    def _forget(self, inner: str) -> None:
        """Take an adapter out of the model; with the last one, the model is the base again."""
        if self.model is self.base or inner not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(inner)
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
    if os.path.getsize(path / CONFIG) > LARGEST_JSON:
        raise AdapterRefused("serve.broken_json", name=name, file=CONFIG)
    size, virtual = size_in_memory(name, path / WEIGHTS, itemsize)
    return Source(name, path, digest_of(path), size, virtual, pinned)


def digest_of(path: Path) -> str:
    """Of the weights and the settings, which scale them."""
    try:
        parts = [sha256(path / WEIGHTS), sha256(path / CONFIG)]
    except OSError as error:
        raise AdapterRefused("serve.no_adapter", name=path.name, file=WEIGHTS) from error
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def size_in_memory(name: str, file: Path, itemsize: int) -> tuple[int, int]:
    """(bytes, virtual tokens), from the file's header alone. Half-precision adapters may be loaded as float32."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > LARGEST_HEADER:
            raise AdapterRefused("serve.broken_weights", name=name)
        try:
            header = json.loads(handle.read(length))
            shapes = {key: t["shape"] for key, t in header.items() if key != "__metadata__"}
            size = sum(math.prod(shape) for shape in shapes.values()) * max(4, itemsize)
            return size, int(shapes.get("prompt_embeddings", [0])[0])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise AdapterRefused("serve.broken_weights", name=name) from error
