"""A client's request while the engine works on it: its answers come in, and it is cancelled when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from peft_run.serve.answers import Choice, Shape
from peft_run.serve.engine import Engine, Piece, Request
from peft_run.serve.sampling import Sampling

LOOK = 0.2  # seconds between two looks whether the client is still there


class Gone(Exception):
    """The client has closed the connection."""


class Running:
    """`add` what is asked for; then `whole` gives all of it at once, or `parts` as it comes."""

    def __init__(self, engine: Engine, shape: Shape, gone: Callable[[], Awaitable[bool]]) -> None:
        self.engine, self.shape, self.gone = engine, shape, gone
        self.requests: list[Request] = []
        self.choices: list[Choice] = []
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def add(self, prompt: list[int], seconds: float, sampling: Sampling, **settings: Any) -> None:
        index = len(self.requests)

        def sink(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

        deadline = time.monotonic() + seconds
        self.requests.append(Request(prompt=prompt, sink=sink, sampling=sampling, deadline=deadline, **settings))
        self.choices.append(Choice())

    async def next(self) -> tuple[int, Piece]:
        """Raises what went wrong with the request, and Gone."""
        while True:
            try:
                index, piece = await asyncio.wait_for(self.pieces.get(), LOOK)
            except (TimeoutError, asyncio.TimeoutError):
                if await self.gone():
                    raise Gone from None
                continue
            if piece.error is not None:
                raise piece.error
            self.choices[index].add(piece)
            return index, piece

    def cancel(self) -> None:
        for request, choice in zip(self.requests, self.choices):
            if choice.finish is None:
                self.engine.cancel(request)

    @property
    def ended(self) -> bool:
        return all(choice.finish for choice in self.choices)

    async def whole(self) -> dict[str, Any]:
        try:
            self.engine.submit(*self.requests)
            while not self.ended:
                await self.next()
        finally:
            self.cancel()
        return self.shape.whole(self.choices)

    async def parts(self, usage: bool) -> AsyncIterator[str]:
        """Server-sent events. The first one is made before this returns, so that a refusal still has its status."""
        try:
            self.engine.submit(*self.requests)
            first = await self.next()
        except BaseException:
            self.cancel()
            raise
        return self._parts(first, usage)

    async def _parts(self, arrived: tuple[int, Piece], usage: bool) -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            while True:
                index, piece = arrived
                if piece.text or piece.finish or index not in begun:
                    yield event(self.shape.part(index, piece, index not in begun))
                    begun.add(index)
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
            self.cancel()


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
