"""In front of the pages: who may come in, and nothing from other hosts.

On this machine's own address everybody who can reach it may, but only under one of its own names: a site elsewhere
whose name leads here (DNS rebinding) is refused, and so is a form that another site sends. On any other address a
secret is needed, in the link (`?token=...`) or typed as a password; a cookie remembers it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from html import escape
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

from peft_run.messages import sentence

LOOPBACK = ("127.0.0.1", "::1", "localhost")
COOKIE = "peft_ui"
LOGIN = "/login"
LARGEST_FORM = 4096
WRONG_SECONDS = 1.0  # a wrong secret costs the sender
# Gradio's page asks other hosts for a script and for fonts, which a page without a network must not miss.
FOREIGN = re.compile(rb"<(script|link)\b[^>]*\b(?:src|href)=[\"']https?://[^>]*>(?:\s*</script>)?", re.IGNORECASE)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Gate:
    """An ASGI application around another. secret: None where none is needed."""

    def __init__(self, app: Any, host: str, secret: str | None) -> None:
        self.app, self.secret = app, secret
        self.own_names_only = host in LOOPBACK
        self.pass_ = None if secret is None else hmac.new(secret.encode(), b"peft ui", hashlib.sha256).hexdigest()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if scope["type"] != "http":  # Gradio 6 has no websockets
            return await send({"type": "websocket.close", "code": 1008})
        if not self.is_own(headers):
            return await JSONResponse({"detail": "another site"}, 403)(scope, receive, send)
        if self.pass_ is not None:
            answer = await self.ask(scope, headers, receive)
            if answer is not None:
                return await answer(scope, receive, send)
        await self.app(scope, receive, Clean(send))

    # -- from which site ----------------------------------------------------------------------------------------------

    def is_own(self, headers: dict[bytes, str]) -> bool:
        host = headers.get(b"host", "")
        if self.own_names_only and name_of(host) not in LOOPBACK:
            return False
        origin = headers.get(b"origin")
        return origin is None or urlsplit(origin).netloc == host

    # -- who ----------------------------------------------------------------------------------------------------------

    async def ask(self, scope: dict[str, Any], headers: dict[bytes, str], receive: Receive) -> Any:
        """None for whoever has shown the secret; else what they get."""
        if self.is_known(headers.get(b"cookie", "")):
            return None
        path = scope.get("root_path", "") + scope["path"]
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if "token" in query:
            if self.is_right(query.pop("token")[0]):
                rest = urlencode(query, doseq=True)
                return self.let_in(path + (f"?{rest}" if rest else ""))
            await asyncio.sleep(WRONG_SECONDS)
        wrong = False
        if scope["method"] == "POST" and path == LOGIN:
            form = parse_qs((await body(receive)).decode("utf-8", "replace"))
            if self.is_right(form.get("secret", [""])[0]):
                return self.let_in("/")
            await asyncio.sleep(WRONG_SECONDS)
            wrong = True
        if "text/html" in headers.get(b"accept", ""):
            return HTMLResponse(form_page(language_of(headers.get(b"accept-language", "")), wrong), 401)
        return JSONResponse({"detail": "a token or password is needed"}, 401)

    def is_known(self, cookies: str) -> bool:
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.pass_.encode())

    def is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.secret.encode())

    def let_in(self, where: str) -> RedirectResponse:
        # One slash: a path that begins with two would lead to another host.
        answer = RedirectResponse("/" + where.lstrip("/\\"), 303)
        answer.set_cookie(COOKIE, self.pass_, httponly=True, samesite="strict")
        return answer


class Clean:
    """Passes answers on with safe headers, and pages without what they would fetch from elsewhere."""

    def __init__(self, send: Any) -> None:
        self.send = send
        self.start: dict[str, Any] | None = None
        self.parts: list[bytes] = []

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() not in HEADERS]
            message = {**message, "headers": [*headers, *HEADERS.items()]}
            kind = dict(headers).get(b"content-type", b"")
            if kind.startswith(b"text/html"):
                self.start = message
                return
        elif self.start is not None and message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            text = FOREIGN.sub(b"", b"".join(self.parts))
            kept = [(n, v) for n, v in self.start["headers"] if n.lower() != b"content-length"]
            await self.send({**self.start, "headers": [*kept, (b"content-length", str(len(text)).encode())]})
            message = {"type": "http.response.body", "body": text}
        await self.send(message)


def name_of(host: str) -> str:
    """`[::1]:7860` -> `::1`"""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def language_of(accepted: str) -> str:
    """The first language of a browser that we have."""
    for part in accepted.split(","):
        code = part.strip().lower()[:2]
        if code in ("zh", "en"):
            return code
    return "en"


async def body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more and size <= LARGEST_FORM:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
    return b"".join(parts)


def form_page(language: str, wrong: bool) -> str:
    def say(key: str) -> str:
        return escape(sentence(f"ui.{key}", language))

    note = f"<p>{say('login_wrong')}</p>" if wrong else ""
    return (
        f'<!doctype html><html lang="{language}"><meta charset="utf-8"><title>peft</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<body style='font:16px system-ui,sans-serif;max-width:24rem;margin:4rem auto;padding:0 1rem'>"
        f"<h1>peft</h1>{note}<form method='post' action='{LOGIN}'><label>{say('login')}<br>"
        "<input name='secret' type='password' autofocus style='font:inherit;width:100%;box-sizing:border-box'></label>"
        f"<p><button style='font:inherit'>{say('login_go')}</button></p></form></body></html>"
    )
