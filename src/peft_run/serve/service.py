"""From what a client asks to what the engine runs: names, templates, token limits, where adapters may come from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_run.config.schema import GENERATIVE
from peft_run.data.render import Renderer
from peft_run.errors import RunError
from peft_run.files import read_json, write_json
from peft_run.serve import adapters as store
from peft_run.serve.adapters import BASE, AdapterRefused, Adapters
from peft_run.serve.engine import Engine

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class TooLong(RunError):
    """The prompt leaves no room for an answer."""


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
    key: str | None = None
    folder: Path | None = None  # adapters may be loaded from here while the server runs
    state: Path | None = None  # and are remembered here


@dataclass
class Service:
    name: str  # of the base model
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.began = int(time.time())
        self.adapters = Adapters(self.model.eval(), self.limits.adapters)
        self.engine = Engine(self.adapters, self.tokenizer, slots=self.limits.slots, queue=self.limits.queue)
        self.itemsize = next(self.model.parameters()).element_size()
        places = getattr(self.model.config, "max_position_embeddings", None) or self.limits.tokens
        self.context = min(self.limits.tokens, places)
        renderer = Renderer(self.tokenizer)
        self.voices = {self.name: Voice(renderer, stop_ids(renderer))}

    # -- models -------------------------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        def card(name: str, **more: Any) -> dict[str, Any]:
            return {"id": name, "object": "model", "created": self.began, "owned_by": "peft", **more}

        known = self.adapters.known.values()
        return [card(self.name, parent=None)] + [card(s.name, parent=self.name, digest=s.digest) for s in known]

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model's name means; `base:adapter` does, too. Raises UnknownAdapter."""
        if model == self.name:
            return None
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
        if name == self.name:
            raise AdapterRefused("serve.name_taken", name=name)

    def _set_voice(self, name: str, voice: Voice | None) -> None:
        others = {n: v for n, v in self.voices.items() if n != name}
        self.voices = {**others, name: voice} if voice else others

    def _voice_of(self, name: str, path: Path, trusted: bool) -> Voice | None:
        """A run's own template, system prompt and stop tokens; None for an adapter that brings none."""
        info = read_json(path / "artefact.json") if (path / "artefact.json").is_file() else None
        if info is None:
            return None
        base = self.voices[self.name].renderer
        if info.get("task") not in (*GENERATIVE, None):
            raise AdapterRefused("serve.other_task", name=name, task=info["task"])
        if info.get("tokenizer_sha256") not in (base.tokenizer_sha256(), None):
            raise AdapterRefused("serve.other_tokenizer", name=name)
        if info.get("template_sha256") in (base.template_sha256(), None):
            return Voice(base, list(info.get("stop_ids") or self.voices[self.name].stop_ids), info.get("system"))
        if not trusted:  # a template is a program
            raise AdapterRefused("serve.other_template", name=name)
        from transformers import AutoTokenizer

        return Voice(Renderer(AutoTokenizer.from_pretrained(str(path))), list(info["stop_ids"]), info.get("system"))

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
            known = self.adapters.known.values()
            paths = {s.name: os.path.relpath(s.path, root) for s in known if os.path.realpath(s.path).startswith(root)}
            write_json(self.limits.state, paths)

    def recall(self) -> list[str]:
        """Offer what was loaded when the server last ran; returns what is not there any more."""
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

    def room(self, prompt: list[int], asked: int | None) -> int:
        """How many tokens an answer may have."""
        left = self.context - len(prompt)
        if left < 1 or (asked or 1) > left:
            raise TooLong("serve.too_long", prompt=len(prompt), asked=asked or 1, limit=self.context)
        return asked or left

    def embedding(self, tokens: list[int], adapter: str | None) -> list[float]:
        """The mean of the last hidden states. In the engine's thread."""
        entry = None if adapter is None else self.adapters.acquire(adapter)
        try:
            ids = torch.tensor([tokens], device=self.engine.device)
            with torch.inference_mode():
                outputs = self.adapters.forward(
                    [BASE if entry is None else entry.inner],
                    input_ids=ids,
                    output_hidden_states=True,
                    use_cache=False,
                    logits_to_keep=1,
                )
            return outputs.hidden_states[-1][0].float().mean(0).tolist()
        finally:
            if entry is not None:
                self.adapters.release(entry)


def stop_ids(renderer: Renderer) -> list[int]:
    if renderer.tokenizer.chat_template is None:
        own = renderer.tokenizer.eos_token_id
        return [own] if own is not None else []
    return renderer.stop_ids()
