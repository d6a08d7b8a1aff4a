"""The routes: OpenAI's, vLLM's two for adapters, those for runs with an output layer, and those for operators."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from peft_run.errors import RunError
from peft_run.serve.adapters import AdapterRefused, NoRoom, UnknownAdapter
from peft_run.serve.answers import Chat, Completion, Shape
from peft_run.serve.gate import Gate, error
from peft_run.serve.heads import ROUTES, NotAnswered
from peft_run.serve.running import Gone, Running
from peft_run.serve.sampling import Sampling
from peft_run.serve.schema import (
    Asked,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadRequest,
    QaRequest,
    TokenClassifyRequest,
    UnloadRequest,
)
from peft_run.serve.service import Generator, OtherRoute, Service, TooLong
from peft_run.serve.worker import Busy, Closing

DRAIN_SECONDS = 30.0
WRONG = "invalid_request_error"

# What goes wrong -> (status, type, code, the field that is to blame, headers)
ANSWERS: dict[type[Exception], tuple[int, str, str, str | None, dict[str, str]]] = {
    Busy: (429, "rate_limit_error", "queue_full", None, {"Retry_After": "1"}),
    NoRoom: (429, "rate_limit_error", "no_room", "model", {"Retry_After": "1"}),
    Closing: (503, "server_error", "closing", None, {"Retry_After": "5"}),
    UnknownAdapter: (404, WRONG, "model_not_found", "model", {}),
    OtherRoute: (400, WRONG, "other_route", "model", {}),
    AdapterRefused: (400, WRONG, "adapter_refused", "model", {}),
    TooLong: (400, WRONG, "context_length_exceeded", None, {}),
    NotAnswered: (400, WRONG, "context_length_exceeded", None, {}),
    RunError: (400, WRONG, "invalid_value", None, {}),
    TimeoutError: (504, "server_error", "timeout", None, {}),
    asyncio.TimeoutError: (504, "server_error", "timeout", None, {}),
    Gone: (499, "server_error", "client_gone", None, {}),
}


def make_app(service: Service) -> Gate:
    """The ASGI application. The engine starts and ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.close, DRAIN_SECONDS)

    app = FastAPI(title="peft serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    add_errors(app)
    add_operator_routes(app, service)
    add_model_routes(app, service)
    if isinstance(service, Generator):
        add_adapter_routes(app, service)
        add_generation_routes(app, service)
    add_head_routes(app, service)
    return Gate(app, service.limits.key, service.limits.body, service.engine.metrics)


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int)) or None
        return error(400, WRONG, "invalid_value", f"{param or 'body'}: {first['msg']}", param)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, problem: HTTPException) -> JSONResponse:
        return error(problem.status_code, WRONG, None, str(problem.detail))

    async def known(request: Request, problem: Exception) -> JSONResponse:
        kind = next(cls for cls in type(problem).__mro__ if cls in ANSWERS)
        status, type_, code, param, headers = ANSWERS[kind]
        return error(status, type_, code, str(problem) or "the request took too long", param, **headers)

    for cls in ANSWERS:
        app.add_exception_handler(cls, known)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, problem: Exception) -> JSONResponse:
        return error(500, "server_error", "internal_error", f"{type(problem).__name__} in the server")


def add_operator_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken."""
        alive = service.engine.alive
        return JSONResponse({"ready": alive}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        text = service.engine.metrics.text(**service.engine.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def add_model_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        card = next((card for card in service.models() if card["id"] == service.canonical(name)), None)
        if card is None:
            raise UnknownAdapter("serve.unknown_adapter", name=name)
        return card


def add_adapter_routes(app: FastAPI, service: Generator) -> None:
    if service.limits.folder is None:
        return

    @app.post("/v1/load_lora_adapter")
    async def load(asked: LoadRequest) -> PlainTextResponse:
        if asked.lora_name in service.adapters.known and not asked.load_inplace:
            raise AdapterRefused("serve.loaded_already", name=asked.lora_name)
        await asyncio.to_thread(service.load, asked.lora_name, asked.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadRequest) -> PlainTextResponse:
        await asyncio.to_thread(service.unload, asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def add_head_routes(app: FastAPI, service: Service) -> None:
    """For runs with an output layer; without such a run the routes say that no model has the name."""

    async def answer(task: str, asked: ClassifyRequest | TokenClassifyRequest | QaRequest) -> dict[str, Any]:
        head = service.head(asked.model, task)
        samples = await asyncio.to_thread(head.samples, asked.rows())
        found = asyncio.wrap_future(head.ask(service.engine, samples))
        data = head.tell(await asyncio.wait_for(found, service.limits.seconds))
        return {"object": "list", "model": asked.model, "data": data}

    @app.post(ROUTES["seq_cls"].path)
    async def classify(asked: ClassifyRequest) -> dict[str, Any]:
        return await answer("seq_cls", asked)

    @app.post(ROUTES["token_cls"].path)
    async def token_classify(asked: TokenClassifyRequest) -> dict[str, Any]:
        return await answer("token_cls", asked)

    @app.post(ROUTES["qa"].path)
    async def qa(asked: QaRequest) -> dict[str, Any]:
        return await answer("qa", asked)


def add_generation_routes(app: FastAPI, service: Generator) -> None:
    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, http: Request):
        adapter = service.adapter_of(asked.model)
        voice = service.voice(adapter)
        prompt = await asyncio.to_thread(voice.prompt, [m.plain() for m in asked.messages])
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_completion_tokens or asked.max_tokens
        return await run(http, Chat, asked, [prompt], adapter, most, logprobs, voice.stop_ids)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request):
        adapter = service.adapter_of(asked.model)
        prompts = [await asyncio.to_thread(service.tokens_of, text) for text in several(asked.prompt)]
        own = service.tokenizer.eos_token_id
        stop_ids = [] if own is None else [own]
        return await run(http, Completion, asked, prompts, adapter, asked.max_tokens, asked.logprobs, stop_ids)

    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest) -> dict[str, Any]:
        adapter = service.adapter_of(asked.model)
        texts = [await asyncio.to_thread(service.tokens_of, text) for text in several(asked.input)]
        for tokens in texts:
            service.room(tokens, None, adapter)
        vectors = []
        for tokens in texts:  # one at a time: generation goes on between them
            job = service.engine.call(lambda tokens=tokens: service.embedding(tokens, adapter), limited=True)
            vectors.append(await asyncio.wrap_future(job))
        data = [
            {"object": "embedding", "index": i, "embedding": encoded(vector, asked.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        total = sum(map(len, texts))
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "model": asked.model, "data": data, "usage": usage}

    async def run(
        http: Request,
        shape: type[Shape],
        asked: Asked,
        prompts: list[list[int]],
        adapter: str | None,
        most: int | None,
        logprobs: int | None,
        stop_ids: list[int],
    ):
        body = shape(asked.model, service.tokenizer, logprobs is not None, sum(map(len, prompts)))
        running = Running(service.engine, service.mailbox, body, http.receive)
        for prompt in prompts:
            room = service.room(prompt, most, adapter)
            for i in range(asked.n):
                seed = None if asked.seed is None else asked.seed + i
                running.add(
                    prompt,
                    service.limits.seconds,
                    Sampling(asked.temperature, asked.top_p, seed),
                    max_tokens=room,
                    adapter=adapter,
                    stop_ids=[] if asked.ignore_eos else stop_ids,
                    stops=asked.stops(),
                    logprobs=logprobs,
                )
        if not asked.stream:
            return JSONResponse(await running.whole())
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(await running.parts(usage), media_type="text/event-stream")


def several(given: Any) -> list[Any]:
    """One text or list of tokens, or several of them, as several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def encoded(vector: list[float], how: str) -> list[float] | str:
    return vector if how == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
