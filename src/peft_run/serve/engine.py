"""Continuous batching: one thread, one model, one batch that requests join and leave between steps.

    while there is work:
        do what was asked for between steps (load or remove an adapter, an embedding)
        take waiting requests into free slots, and read a piece of the first prompt that is not read yet
        one step for all rows, each with its own adapter, sampling and end

What a request gets is what it would get alone: its row has its own adapter, positions, generator and stop strings, and
padding is masked. Only the rounding of a sum may differ with the number of rows.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from peft_run.errors import RunError
from peft_run.serve.adapters import BASE, Adapters, Entry
from peft_run.serve.cache import SlotCache
from peft_run.serve.metrics import Metrics
from peft_run.serve.sampling import Chosen, Sampling, choose
from peft_run.serve.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 512  # tokens of a prompt that are read between two steps, so that a long one does not stop the others
KNOWN_ATTENTION = {"full_attention", "sliding_attention"}


class Busy(RunError):
    """The queue is full."""


class Closing(RunError):
    """The server takes no new requests."""


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

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text = Text(tokenizer, self.stops)
        self.generator = self.sampling.generator()
        self.unread = self.prompt
        self.cache = DynamicCache()


class Engine:
    def __init__(
        self, adapters: Adapters, tokenizer: PreTrainedTokenizerBase, *, slots: int = 16, queue: int = 64
    ) -> None:
        check_attention(adapters.base.config)
        self.adapters, self.tokenizer = adapters, tokenizer
        self.slots, self.queue = slots, queue
        self.metrics = Metrics()
        self.cache = SlotCache(slots)
        self.cache_name = (
            "cache" if "cache" in inspect.signature(adapters.base.forward).parameters else "past_key_values"
        )
        self.device = next(adapters.base.parameters()).device
        self.waiting: deque[Request] = deque()
        self.reading: deque[Request] = deque()  # have a slot, and a prompt that is not read to its end
        self.running: list[Request] = []  # by row
        self.jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self.closing = self.ended = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -- for all threads ----------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        self.thread.start()
        return self

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.closing

    def submit(self, *requests: Request) -> None:
        """Queue requests, all of them or, where the queue has no room for all, none."""
        with self.changed:
            self._check_open(len(requests))
            self.waiting.extend(requests)
            self.changed.notify()

    def call(self, work: Callable[[], Any], *, limited: bool = False) -> Future:
        """Run something in the engine's thread between two steps. limited: it counts against the queue's limit."""
        future: Future = Future()
        with self.changed:
            self._check_open(1 if limited else 0)
            self.jobs.append((work, future))
            self.changed.notify()
        return future

    def cancel(self, request: Request) -> None:
        """Free its slot before the next step. A request that has ended stays as it is."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, finish what there is; after `timeout` seconds cancel the rest. Whether all finished."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout)
        finished = not self.thread.is_alive()
        with self.changed:
            self.ended = True
            self.changed.notify()
        self.thread.join()
        return finished

    def _check_open(self, more: int) -> None:
        if self.closing or not self.thread.is_alive():
            raise Closing("serve.closing")
        if more and len(self.waiting) + len(self.jobs) + more > self.queue:
            raise Busy("serve.busy", limit=self.queue)

    # -- the engine's thread ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.reading or self.running or self.jobs or self.closing):
                    self.changed.wait()
                idle = not (self.waiting or self.reading or self.running or self.jobs)
                if self.ended or (self.closing and idle):
                    break
            self.step()
        for request in [*self.waiting, *self.reading, *self.running]:
            request.sink(Piece("", [], error=Closing("serve.closing")))
        for _, future in self.jobs:
            future.set_exception(Closing("serve.closing"))

    def step(self) -> None:
        """Everything that happens between two tokens, and the token."""
        self._do_jobs()
        self._drop_cancelled()
        self._admit()
        if self.reading:
            self._guarded(self._read_piece, [self.reading[0]])
        if self.running:
            self._guarded(self._decode, list(self.running))

    def _guarded(self, work: Callable[[], None], concerned: list[Request]) -> None:
        """What fails, fails for the requests that it was done for; the others and the server go on."""
        try:
            work()
        except Exception as error:  # out of memory, or a fault of a model that others never meet
            self.metrics.count("engine_errors")
            for request in concerned:
                self._end(request, Piece("", [], error=error))

    def _do_jobs(self) -> None:
        while self.jobs:
            work, future = self.jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

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
            self.reading.append(request)

    def _read_piece(self) -> None:
        """A piece of the first prompt, alone; after its last one, the first token is chosen and the row joins."""
        request = self.reading[0]
        piece, request.unread = request.unread[:PIECE], request.unread[PIECE:]
        logits = self._forward([request], [piece], request.cache, None)
        self.metrics.count("prompt_tokens", len(piece))
        if request.unread:
            return
        self.reading.popleft()
        request.row = self.cache.join(request.cache)
        self.running.append(request)
        request.cache = None
        self.metrics.observe("time_to_first_token_seconds", time.monotonic() - request.arrived)
        self._choose(request, logits[0])

    def _decode(self) -> None:
        rows = list(self.running)
        mask = self.cache.before_step()
        places = torch.tensor(self.cache.lengths)[:, None]
        logits = self._forward(rows, [[r.last] for r in rows], self.cache, mask, places)
        self.cache.after_step()
        self.metrics.count("steps")
        self.metrics.count("step_rows", len(rows))
        for i, request in enumerate(rows):
            self._choose(request, logits[i])

    def _forward(self, rows, tokens, cache, mask, places=None) -> torch.Tensor:
        """Logits (rows, vocabulary) after the last tokens. tokens: one list a row, equally long."""
        inputs = {"input_ids": torch.tensor(tokens, device=self.device), self.cache_name: cache, "use_cache": True}
        if mask is not None:
            inputs |= {"attention_mask": mask.to(self.device), "position_ids": places.to(self.device)}
        return self.adapters.forward([r.inner for r in rows], **inputs, logits_to_keep=1).logits[:, -1]

    def _choose(self, request: Request, logits: torch.Tensor) -> None:
        chosen = choose(logits, request.sampling, request.generator, request.logprobs)
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
        request.cache = None
        if last is not None:
            request.sink(last)


def check_attention(config: Any) -> None:
    """The slotted cache holds keys and values; models that keep another kind of state cannot use it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if config.is_encoder_decoder or kinds - KNOWN_ATTENTION:
        raise RunError("serve.model_kind", kind=config.model_type)
