"""From what a client asks to what the engine runs: names, templates, token limits, where adapters may come from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from peft_run.config.schema import GENERATIVE
from peft_run.data.render import Renderer
from peft_run.errors import RunError
from peft_run.files import read_json, write_json
from peft_run.serve import adapters as store
from peft_run.serve.adapters import LARGEST_JSON, AdapterRefused, Adapters, UnknownAdapter
from peft_run.serve.engine import Engine
from peft_run.serve.heads import Head
from peft_run.serve.running import Mailbox
from peft_run.serve.worker import Worker

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class TooLong(RunError):
    """The prompt leaves no room for an answer."""


class OtherRoute(RunError):
    """The model answers something else."""


class Brought(BaseModel):
    """What an adapter's artefact.json says of how it is talked to. Anybody may have written it."""

    task: str | None = None
    tokenizer_sha256: str | None = None
    template_sha256: str | None = None
    stop_ids: Annotated[list[int], Field(max_length=64)] | None = None
    system: Annotated[str, Field(max_length=1 << 16)] | None = None

    @classmethod
    def read(cls, name: str, file: Path) -> Brought | None:
        """None where there is no such file. Raises AdapterRefused."""
        if not file.is_file():
            return None
        try:
            if file.stat().st_size > LARGEST_JSON:
                raise ValueError("too large")
            return cls.model_validate(read_json(file))
        except (ValueError, OSError, RecursionError) as error:
            raise AdapterRefused("serve.broken_json", name=name, file=file.name) from error


@dataclass
class Voice:
    """How chats with a model are written: its template, what ends an answer, the system prompt it was tuned with."""

    renderer: Renderer
    stop_ids: list[int]
    system: str | None = None

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.renderer.prompt(messages)


@dataclass
class Limits:
    slots: int = 16
    queue: int = 64
    tokens: int = 4096  # of prompt and answer together; the model's own limit holds, too
    seconds: float = 300.0
    body: int = 4 << 20
    adapters: int | None = None  # bytes
    prefixes: int = 256 << 20  # bytes for beginnings that prompts share
    key: str | None = None
    folder: Path | None = None  # adapters may be loaded from here while the server runs
    state: Path | None = None  # and are remembered here


class Service:
    """What a server serves. There is always an `engine`; generating ones are `Generator`s."""

    generates = False

    def __init__(self, limits: Limits | None = None, engine: Worker | None = None) -> None:
        self.limits = limits or Limits()
        self.began = int(time.time())
        self.engine = engine or Worker(queue=self.limits.queue)
        self.mailbox = Mailbox()
        self.heads: dict[str, Head] = {}

    def models(self) -> list[dict[str, Any]]:
        return [self.card(head.name, task=head.task) for head in self.heads.values()]

    def canonical(self, model: str) -> str:
        """The name that `models` has for it. Raises UnknownAdapter where one can tell."""
        return model

    def card(self, name: str, **more: Any) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.began, "owned_by": "peft", **more}

    def names(self) -> set[str]:
        return {card["id"] for card in self.models()}

    def offer_head(self, head: Head) -> None:
        """Serve a run that has an output layer of its own. Before the server starts."""
        if head.name in self.names() or not store.NAME.fullmatch(head.name):
            raise AdapterRefused("serve.name_taken", name=head.name)
        self.heads[head.name] = head

    def head(self, model: str, task: str) -> Head:
        """Raises UnknownAdapter, and OtherRoute for a model of another task."""
        if (head := self.heads.get(model)) is not None and head.task == task:
            return head
        if model not in self.names():
            raise UnknownAdapter("serve.unknown_adapter", name=model)
        route = "/v1/chat/completions" if head is None else head.route.path
        raise OtherRoute("serve.other_route", name=model, route=route)

    def recall(self) -> list[str]:
        """Offer what was loaded when the server last ran; returns what is not there any more."""
        return []


class Generator(Service):
    """A base model that writes, with its adapters."""

    generates = True
    engine: Engine

    def __init__(
        self, name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None
    ) -> None:
        """name: of the base model."""
        limits = limits or Limits()
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.adapters = Adapters(model.eval(), limits.adapters)
        settings = {"slots": limits.slots, "queue": limits.queue, "prefixes": limits.prefixes}
        super().__init__(limits, Engine(self.adapters, tokenizer, **settings))
        self.itemsize = next(model.parameters()).element_size()
        places = getattr(model.config, "max_position_embeddings", None) or limits.tokens
        self.context = min(limits.tokens, places)
        renderer = Renderer(tokenizer)
        self.voices = {name: Voice(renderer, stop_ids(renderer))}

    # -- models -------------------------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        adapters = [self.card(s.name, parent=self.name, digest=s.digest) for s in self.adapters.known.values()]
        return [self.card(self.name, parent=None), *adapters, *super().models()]

    def canonical(self, model: str) -> str:
        return model if model in self.heads else self.adapter_of(model) or self.name

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model's name means; `base:adapter` does, too.

        Raises UnknownAdapter, and OtherRoute for a run that does not write.
        """
        if model == self.name:
            return None
        if (head := self.heads.get(model)) is not None:
            raise OtherRoute("serve.other_route", name=model, route=head.route.path)
        known = self.adapters.known
        return self.adapters.source(model if model in known else model.removeprefix(f"{self.name}:")).name

    def voice(self, adapter: str | None) -> Voice:
        return self.voices.get(adapter or self.name) or self.voices[self.name]

    def offer(self, name: str, path: Path, *, pinned: bool = False, trusted: bool = True) -> None:
        """Make an adapter known before the server starts. trusted: its own chat template may be used."""
        self._check_name(name)
        source = store.inspect(name, path, self.itemsize, pinned=pinned)
        voice = self._voice_of(name, path, trusted)
        self.adapters.add(source)
        self._set_voice(name, voice)

    def _check_name(self, name: str) -> None:
        if name == self.name or name in self.heads:
            raise AdapterRefused("serve.name_taken", name=name)

    def _set_voice(self, name: str, voice: Voice | None) -> None:
        others = {n: v for n, v in self.voices.items() if n != name}
        self.voices = {**others, name: voice} if voice else others

    def _voice_of(self, name: str, path: Path, trusted: bool) -> Voice | None:
        """A run's own template, system prompt and stop tokens; None for an adapter that brings none."""
        info = Brought.read(name, path / "artefact.json")
        if info is None:
            return None
        base = self.voices[self.name]
        if info.task not in (*GENERATIVE, None):
            raise AdapterRefused("serve.other_task", name=name, task=info.task)
        if info.tokenizer_sha256 not in (base.renderer.tokenizer_sha256(), None):
            raise AdapterRefused("serve.other_tokenizer", name=name)
        stop_ids = info.stop_ids or base.stop_ids
        if info.template_sha256 in (base.renderer.template_sha256(), None):
            return Voice(base.renderer, stop_ids, info.system)
        if not trusted:  # a template is a program
            raise AdapterRefused("serve.other_template", name=name)
        from transformers import AutoTokenizer

        return Voice(Renderer(AutoTokenizer.from_pretrained(str(path))), stop_ids, info.system)

    # -- while it runs ------------------------------------------------------------------------------------------------

    def load(self, name: str, asked: str) -> None:
        """Load an adapter from the folder that allows it. Returns when no request can get the old one any more."""
        path = self._inside(name, asked)
        self._check_name(name)
        source = store.inspect(name, path, self.itemsize)
        voice = self._voice_of(name, path, trusted=False)
        self.engine.call(lambda: (self.adapters.add(source), self._set_voice(name, voice))).result()
        self._remember()

    def unload(self, name: str) -> None:
        self.engine.call(lambda: (self.adapters.remove(name), self._set_voice(name, None))).result()
        self._remember()

    def _inside(self, name: str, asked: str) -> Path:
        """The real path, which links cannot lead out of the folder."""
        if self.limits.folder is None or "\0" in asked:
            raise AdapterRefused("serve.outside", name=name)
        root = os.path.realpath(self.limits.folder)
        path = os.path.realpath(os.path.join(root, asked))
        if os.path.commonpath([root, path]) != root or path == root:
            raise AdapterRefused("serve.outside", name=name)
        for file in (store.CONFIG, store.WEIGHTS):
            if os.path.islink(os.path.join(path, file)):
                raise AdapterRefused("serve.outside", name=name)
        return Path(path)

    def _remember(self) -> None:
        if self.limits.state is not None:
            root = os.path.realpath(self.limits.folder or "")
            paths = {source.name: os.path.realpath(source.path) for source in self.adapters.known.values()}
            inside = {name: path for name, path in paths.items() if os.path.commonpath([root, path]) == root}
            write_json(self.limits.state, {name: os.path.relpath(path, root) for name, path in inside.items()})

    def recall(self) -> list[str]:
        state, lost = self.limits.state, []
        for name, asked in (read_json(state) if state is not None and state.is_file() else {}).items():
            if name in self.adapters.known:
                continue
            try:
                self.offer(name, self._inside(name, asked), trusted=False)
            except RunError as error:
                lost.append(str(error))
        return lost

    # -- requests -----------------------------------------------------------------------------------------------------

    def tokens_of(self, text: str | list[int]) -> list[int]:
        """Raises TooLong for an empty text, too: a model needs something to go on from."""
        if not isinstance(text, str):
            if max(text) >= self.model.config.vocab_size:
                raise TooLong("serve.unknown_token", size=self.model.config.vocab_size)
            return list(text)
        return self.tokenizer(text)["input_ids"] or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0]

    def room(self, prompt: list[int], asked: int | None, adapter: str | None = None) -> int:
        """How many tokens an answer may have."""
        virtual = 0 if adapter is None else self.adapters.source(adapter).virtual
        left = self.context - virtual - len(prompt)
        if left < 1 or (asked or 1) > left:
            raise TooLong("serve.too_long", prompt=len(prompt) + virtual, asked=asked or 1, limit=self.context)
        return asked or left

    def embedding(self, tokens: list[int], adapter: str | None) -> list[float]:
        """The mean of the last hidden states. In the engine's thread."""
        entry = None if adapter is None else self.adapters.acquire(adapter)
        try:
            return self.engine.states(tokens, entry).float().mean(0).tolist()
        finally:
            if entry is not None:
                self.adapters.release(entry)


def stop_ids(renderer: Renderer) -> list[int]:
    if renderer.tokenizer.chat_template is None:
        own = renderer.tokenizer.eos_token_id
        return [own] if own is not None else []
    return renderer.stop_ids()
