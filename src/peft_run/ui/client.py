"""A running `peft serve` as the pages see it: who is served, load and unload, and answers as they come."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

from peft_run.errors import RunError
from peft_run.ui.jobs import Job, Jobs

KIND = "serve"
HOST = "127.0.0.1"
QUICK = 3.0  # seconds for what needs no model
SLOW = 600.0


class Server:
    """A job of the kind `serve`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.url = f"http://{HOST}:{job.more['port']}"
        self.headers = {"authorization": f"Bearer {job.more['key']}"}

    def models(self) -> list[dict[str, Any]]:
        """The base and the adapters that it serves; none while it is starting or gone."""
        import httpx

        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=self.headers, timeout=QUICK)
            return answer.json()["data"] if answer.status_code == 200 else []
        except (httpx.HTTPError, ValueError, KeyError):
            return []

    def load(self, name: str, path: str) -> None:
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": path, "load_inplace": True})

    def unload(self, name: str) -> None:
        self._post("unload_lora_adapter", {"lora_name": name})

    def _post(self, route: str, body: dict[str, Any]) -> None:
        import httpx

        try:
            answer = httpx.post(f"{self.url}/v1/{route}", json=body, headers=self.headers, timeout=SLOW)
        except httpx.HTTPError as error:
            raise self._silent(error) from error
        if answer.status_code != 200:
            raise RunError("ui.server_refused", problem=problem_of(answer.text))

    async def chat(
        self, model: str, messages: Sequence[dict[str, str]], temperature: float, max_tokens: int
    ) -> AsyncIterator[str]:
        """The answer piece by piece. Raises RunError with what the server said."""
        import httpx

        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        try:
            async with (
                httpx.AsyncClient(timeout=SLOW) as client,
                client.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=self.headers) as answer,
            ):
                if answer.status_code != 200:
                    raise RunError("ui.server_refused", problem=problem_of((await answer.aread()).decode()))
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise RunError("ui.server_refused", problem=event["error"]["message"])
                    yield event["choices"][0]["delta"].get("content") or ""
        except httpx.HTTPError as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> RunError:
        """Why no answer came: a process that runs and takes no connections is reading its model."""
        import httpx

        if isinstance(error, httpx.ConnectError) and self.job.is_on:
            return RunError("ui.server_starting")
        return RunError("ui.server_gone", problem=type(error).__name__)


def start(jobs: Jobs, runs: Sequence[str], base: str | None, port: int | None, language: str) -> Server:
    """Serve these runs, or a base alone, on this machine only, with a key that only the page's own folder holds.

    port: a free one if None. Adapters may be loaded later from anywhere in the workspace.
    """
    port = port or free_port()
    key = secrets.token_urlsafe(24)
    words = ["serve", *runs, *(["--base", base] if base else [])]
    words += ["--port", str(port), "--allow-runtime-lora", "."]
    job = jobs.start(KIND, *words, language=language, environment={"PEFT_API_KEY": key}, port=port, key=key)
    return Server(job)


def running(jobs: Jobs) -> list[Server]:
    return [Server(job) for job in jobs.all(KIND) if job.is_on]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def problem_of(text: str) -> str:
    """The message in an error of the server."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:300]
