"""Continuous batching: one thread, one model, one batch that requests join and leave between steps.

    while there is work:
        do what was asked for between steps (load or remove an adapter, an embedding)
        take waiting requests into free slots, and read a piece of prompts that are not read yet, several at once
        one step for all rows, each with its own adapter, sampling and end

What a request gets is what it would get alone: its row has its own adapter, positions, generator and stop strings, and
padding is masked. Only the rounding of a sum may differ with the number of rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from peft_run.errors import RunError
from peft_run.serve.adapters import BASE, Adapters, Entry
from peft_run.serve.cache import SlotCache
from peft_run.serve.prefixes import Prefixes
from peft_run.serve.reading import Past, ReadCache, joined, length, without
from peft_run.serve.sampling import Chosen, Sampling, choose
from peft_run.serve.text import Text
from peft_run.serve.worker import Closing, Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

PIECE = 512  # tokens of prompts that are read between two steps, so that long ones do not stop the others
PADDING = 1.5  # prompts are read together while they take at most so many times the room of their tokens
KNOWN_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass
class Piece:
    """A part of an answer: the tokens since the last one and the text that is certain now."""

    text: str
    tokens: list[Chosen]
    finish: str | None = None  # "stop" or "length" with the last one
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    prompt: list[int]
    max_tokens: int
    sink: Callable[[Piece], None]  # called in the engine's thread
    adapter: str | None = None  # None: the base model
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = ()
    stops: Sequence[str] = ()
    logprobs: int | None = None
    deadline: float | None = None  # time.monotonic()
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)

    # While it runs:
    entry: Entry | None = None
    row: int = -1
    made: int = 0
    last: int = -1

    @property
    def inner(self) -> str:
        return BASE if self.entry is None else self.entry.inner

    @property
    def first(self) -> Past:
        return [] if self.entry is None else self.entry.first

    @property
    def digest(self) -> str:
        return BASE if self.entry is None else self.entry.source.digest

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text = Text(tokenizer, self.stops)
        self.generator = self.sampling.generator()
        self.past: Past | None = []  # what is read of the prompt, and a prompt method's virtual tokens
        self.unread = self.prompt


class Engine(Worker):
    def __init__(
        self,
        adapters: Adapters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 16,
        queue: int = 64,
        prefixes: int = 0,
    ) -> None:
        """prefixes: bytes for beginnings that prompts share."""
        check_attention(adapters.base.config)
        super().__init__(queue=queue)
        self.adapters, self.tokenizer, self.slots = adapters, tokenizer, slots
        self.cache = SlotCache(slots)
        self.prefixes = Prefixes(prefixes)
        self.layers = adapters.base.config.get_text_config(decoder=True).num_hidden_layers
        self.device = next(adapters.base.parameters()).device
        self.waiting: deque[Request] = deque()
        self.reading: deque[Request] = deque()  # have a slot, and a prompt that is not read to its end
        self.running: list[Request] = []  # by row

    # -- for all threads ----------------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> None:
        """Queue requests, all of them or, where the queue has no room for all, none."""
        with self.changed:
            self.check_open(len(requests))
            self.waiting.extend(requests)
            self.changed.notify()

    def cancel(self, request: Request) -> None:
        """Free its slot before the next step. A request that has ended stays as it is."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def queued(self) -> int:
        return super().queued() + len(self.waiting)

    def gauges(self) -> dict[str, float]:
        return super().gauges() | {
            "requests_running": len(self.running) + len(self.reading),
            "requests_waiting": len(self.waiting),
            "cache_bytes": self.cache.nbytes(),
            "prefix_bytes": self.prefixes.nbytes,
            "prefix_tokens_total": self.prefixes.found,
            "adapters_known": len(self.adapters.known),
            "adapters_loaded": len(self.adapters.held),
            "adapter_bytes": self.adapters.nbytes(),
            "adapter_loads_total": self.adapters.loads,
            "adapter_evictions_total": self.adapters.evictions,
        }

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        return super().idle() and not (self.waiting or self.reading or self.running)

    def step(self) -> None:
        """Everything that happens between two tokens, and the token."""
        self.do_jobs()
        self._drop_cancelled()
        self._admit()
        if self.reading:
            self._read()
        if self.running:
            self._guarded(self._decode, list(self.running))

    def give_up(self) -> None:
        super().give_up()
        for request in [*self.waiting, *self.reading, *self.running]:
            request.sink(Piece("", [], error=Closing("serve.closing")))

    def _guarded(self, work: Callable[[], None], concerned: list[Request]) -> None:
        """What fails, fails for the requests that it was done for; the others and the server go on."""
        try:
            work()
        except Exception as error:  # out of memory, or a fault of a model that others never meet
            self.metrics.count("engine_errors")
            for request in concerned:
                self._end(request, Piece("", [], error=error))

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        with self.changed:
            waiting = list(self.waiting)
        for request in [*waiting, *self.reading, *self.running]:
            if request.cancelled:
                self.metrics.count("requests_cancelled")
                self._end(request, None)
            elif request.deadline is not None and now > request.deadline:
                self._end(request, Piece("", [], error=TimeoutError()))

    def _admit(self) -> None:
        while self.waiting and len(self.reading) + len(self.running) < self.slots:
            with self.changed:
                request = self.waiting.popleft()
            try:
                request.entry = None if request.adapter is None else self.adapters.acquire(request.adapter)
            except Exception as error:
                request.sink(Piece("", [], error=error))
                continue
            request.begin(self.tokenizer)
            known = self.prefixes.find(request.digest, request.prompt)
            request.unread = request.prompt[length(known) :]
            request.past = joined([request.first, known])
            self.reading.append(request)

    def _read(self) -> None:
        """A piece of some prompts. What fails for several is tried again one by one, to find the one to blame."""
        chosen = self._to_read()
        try:
            self._read_pieces(chosen)
        except Exception:
            for request in chosen:
                self._guarded(partial(self._read_pieces, [request]), [request])

    def _to_read(self) -> list[Request]:
        """The first prompt that is not read to its end, and those that fit beside its piece."""
        chosen: list[Request] = []
        width = tokens = 0
        for request in self.reading:
            count = min(len(request.unread), PIECE)
            room = max(width, count) * (len(chosen) + 1)
            if chosen and (room > PIECE or room > PADDING * (tokens + count)):
                continue
            chosen.append(request)
            width, tokens = max(width, count), tokens + count
        return chosen

    def _read_pieces(self, chosen: list[Request]) -> None:
        """After the last piece of a prompt its first token is chosen, and it joins the rows that take steps."""
        pieces = [request.unread[:PIECE] for request in chosen]
        cache = ReadCache([request.past for request in chosen], list(map(len, pieces)), self.layers)
        logits = self._forward(chosen, cache, cache.inputs(pieces))
        likeliest = logits.argmax(-1).tolist()
        self.metrics.count("prompt_tokens", sum(map(len, pieces)))
        self.metrics.count("prompt_forwards")
        for row, (request, piece) in enumerate(zip(chosen, pieces)):
            request.past, request.unread = cache.past(row), request.unread[len(piece) :]
            if not request.unread:
                self._guarded(partial(self._begin_row, request, logits[row], likeliest[row]), [request])

    def _begin_row(self, request: Request, logits: torch.Tensor, likeliest: int) -> None:
        self.reading.remove(request)
        self.prefixes.keep(request.digest, request.prompt, without(request.past, length(request.first)))
        request.row = self.cache.join(request.past)
        self.running.append(request)
        request.past = None
        self.metrics.observe("time_to_first_token_seconds", time.monotonic() - request.arrived)
        self._choose(request, logits, likeliest)

    def _decode(self) -> None:
        rows = list(self.running)
        inputs = {
            "input_ids": torch.tensor([[r.last] for r in rows]),
            "attention_mask": self.cache.before_step(),
            "position_ids": torch.tensor(self.cache.lengths)[:, None],
        }
        logits = self._forward(rows, self.cache, inputs)
        likeliest = logits.argmax(-1).tolist()
        self.cache.after_step()
        self.metrics.count("steps")
        self.metrics.count("step_rows", len(rows))
        for i, request in enumerate(rows):
            self._choose(request, logits[i], likeliest[i])

    def _forward(self, rows: list[Request], cache: Cache, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits (rows, vocabulary) after the last column."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        settings = {self.adapters.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        return self.adapters.forward([r.inner for r in rows], **inputs, **settings).logits[:, -1]

    def states(self, tokens: list[int], entry: Entry | None) -> torch.Tensor:
        """The last hidden states (tokens, dim) of a text."""
        cache = ReadCache([entry.first if entry else []], [len(tokens)], self.layers)
        inputs = {name: tensor.to(self.device) for name, tensor in cache.inputs([tokens]).items()}
        settings = {self.adapters.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        names = [entry.inner if entry else BASE]
        return self.adapters.forward(names, **inputs, **settings, output_hidden_states=True).hidden_states[-1][0]

    def _choose(self, request: Request, logits: torch.Tensor, likeliest: int) -> None:
        chosen = choose(logits, likeliest, request.sampling, request.generator, request.logprobs)
        request.last, request.made = chosen.token, request.made + 1
        self.metrics.count("generated_tokens")
        if chosen.token in request.stop_ids:
            self._end(request, Piece(request.text.finish(), [], "stop"))
            return
        text = request.text.add(chosen.token)
        if request.text.stopped:
            self._end(request, Piece(text, [chosen], "stop"))
        elif request.made >= request.max_tokens:
            text += request.text.finish()
            self._end(request, Piece(text, [chosen], "stop" if request.text.stopped else "length"))
        else:
            request.sink(Piece(text, [chosen]))

    def _end(self, request: Request, last: Piece | None) -> None:
        """Take a request out, wherever it is, and free what it holds."""
        with self.changed:
            if request in self.waiting:
                self.waiting.remove(request)
        if request in self.reading:
            self.reading.remove(request)
        if request in self.running:
            self.cache.leave(request.row)
            moved = self.running.pop()
            if moved is not request:
                self.running[request.row] = moved
                moved.row = request.row
        if request.entry is not None:
            entry, request.entry = request.entry, None
            self.adapters.release(entry)
        request.past = None
        if last is not None:
            request.sink(last)


def check_attention(config: Any) -> None:
    """The slotted cache holds keys and values; models that keep another kind of state cannot use it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if config.is_encoder_decoder or kinds - KNOWN_ATTENTION:
        raise RunError("serve.model_kind", kind=config.model_type)
