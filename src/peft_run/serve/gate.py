"""In front of all routes: the key, the size of a body, and the time it may take to come. Nothing is parsed before."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse

from peft_run.serve.metrics import Metrics

OPEN = {"/health"}  # all other paths need the key, also those that do not exist
BODY_SECONDS = 30.0

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Gate:
    """An ASGI application around another. The body reaches it whole."""

    def __init__(self, app: Any, key: str | None, largest: int, metrics: Metrics) -> None:
        self.app, self.key, self.largest, self.metrics = app, key, largest, metrics

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websockets
            return await send({"type": "websocket.close", "code": 1008})

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count("responses", status=message["status"])
            await send(message)

        await self.answer(scope, receive, counted)

    async def answer(self, scope: dict[str, Any], receive: Receive, send: Any) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not self.allowed(headers.get(b"authorization", b"")):
            refusal = error(401, "authentication_error", "invalid_api_key", "a valid key is needed: Bearer KEY")
            return await refusal(scope, receive, send)
        try:
            body = await asyncio.wait_for(self.body(headers, receive), BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            return await error(408, "invalid_request_error", "timeout", "the body came too slowly")(
                scope, receive, send
            )
        except ConnectionError:
            return None
        if body is None:
            text = f"the body is larger than {self.largest} bytes"
            refusal = error(413, "invalid_request_error", "body_too_large", text)
            refusal.headers["connection"] = "close"
            return await refusal(scope, receive, send)
        await self.app(scope, replay(body, receive), send)

    def allowed(self, given: bytes) -> bool:
        if self.key is None:
            return True
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self.key.encode()) and scheme.lower() == b"bearer"

    async def body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body, or None where it is too large."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:19]) > self.largest:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.largest:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def once() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def error(status: int, kind: str, code: str | None, message: str, param: str | None = None, **headers: str) -> Any:
    """An answer in the shape that OpenAI's clients read."""
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers={k.replace("_", "-"): v for k, v in headers.items()})
