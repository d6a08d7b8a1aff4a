"""One client's request while the engine works on it: its answers come in, and it is cancelled when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from peft_run.serve.answers import Choice, Shape
from peft_run.serve.engine import Engine, Piece, Request
from peft_run.serve.sampling import Sampling


class Gone(Exception):
    """The client has closed the connection."""


class Mailbox:
    """What the engine's thread tells the event loop: one wake-up for all that a step has made, not one a row."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.letters: deque[Callable[[], None]] = deque()
        self.asleep = True

    def post(self, letter: Callable[[], None]) -> None:
        """Have it called in the loop. From any thread."""
        self.letters.append(letter)
        if self.asleep and self.loop is not None:
            self.asleep = False
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._open)

    def _open(self) -> None:
        self.asleep = True  # before the letters are read: one that comes now wakes the loop again
        while self.letters:
            self.letters.popleft()()


class Running:
    """`add` what is asked for; then `whole` gives all of it at once, or `parts` as it comes.

    receive: the connection's; after the body it has only to tell that the client has gone.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox, shape: Shape, receive: Callable[[], Awaitable[Any]]) -> None:
        self.engine, self.mailbox, self.shape, self.receive = engine, mailbox, shape, receive
        self.requests: list[Request] = []
        self.choices: list[Choice] = []
        self.pieces: list[tuple[int, Piece]] = []
        self.gone = False
        self.news = asyncio.Event()
        self.mailbox.loop = asyncio.get_running_loop()

    def add(self, prompt: list[int], seconds: float, sampling: Sampling, **settings: Any) -> None:
        index = len(self.requests)

        def sink(piece: Piece) -> None:
            self.mailbox.post(lambda: self._arrived(index, piece))

        deadline = time.monotonic() + seconds
        self.requests.append(Request(prompt=prompt, sink=sink, sampling=sampling, deadline=deadline, **settings))
        self.choices.append(Choice())

    def _arrived(self, index: int, piece: Piece) -> None:
        self.pieces.append((index, piece))
        self.news.set()

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.cancel()  # here, because a stream may be stuck where it sends
        self.news.set()

    async def next(self) -> Sequence[tuple[int, Piece]]:
        """All that has come. Raises what went wrong with the request, and Gone."""
        while not self.pieces:
            if self.gone:
                raise Gone
            self.news.clear()
            await self.news.wait()
        pieces, self.pieces = self.pieces, []
        for index, piece in pieces:
            if piece.error is not None:
                raise piece.error
            self.choices[index].add(piece)
        return pieces

    def begin(self) -> None:
        self.engine.submit(*self.requests)
        self.watching = asyncio.create_task(self._watch())

    def cancel(self) -> None:
        """What has not ended."""
        for request, choice in zip(self.requests, self.choices):
            if choice.finish is None:
                self.engine.cancel(request)

    def end(self) -> None:
        self.cancel()
        self.watching.cancel()

    @property
    def ended(self) -> bool:
        return all(choice.finish for choice in self.choices)

    async def whole(self) -> dict[str, Any]:
        self.begin()
        try:
            while not self.ended:
                await self.next()
        finally:
            self.end()
        return self.shape.whole(self.choices)

    async def parts(self, usage: bool) -> AsyncIterator[str]:
        """Server-sent events. The first one is made before this returns, so that a refusal still has its status."""
        self.begin()
        try:
            first = await self.next()
        except BaseException:
            self.end()
            raise
        return self._parts(first, usage)

    async def _parts(self, arrived: Sequence[tuple[int, Piece]], usage: bool) -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            while True:
                events = []
                for index, piece in arrived:
                    if piece.text or piece.finish or self.shape.logprobs or index not in begun:
                        events.append(event(self.shape.part(index, piece, index not in begun)))
                        begun.add(index)
                if events:
                    yield "".join(events)
                if self.ended:
                    break
                arrived = await self.next()
            if usage:
                yield event(self.shape.last(self.choices))
            yield "data: [DONE]\n\n"
        except Gone:
            return
        except Exception as problem:  # the status is sent already
            yield event({"error": {"message": str(problem) or type(problem).__name__, "type": "server_error"}})
        finally:
            self.end()


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
