"""`peft serve`."""

from __future__ import annotations

import argparse

HELP = {
    "en": "serve a base model and its adapters over an OpenAI-compatible API",
    "zh": "以兼容 OpenAI 的接口提供基础模型及其适配器",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished runs on one base model")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where no run names it")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="a further adapter")
    parser.add_argument("--pin", action="append", default=[], metavar="NAME", help="never evict this adapter")
    parser.add_argument("--served-name", metavar="NAME", help="what clients call the base model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", metavar="KEY", help="or PEFT_API_KEY; other hosts than this one need it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--no-packing", action="store_true", help="leave float32 weights in torch's order")
    parser.add_argument("--slots", type=int, default=16, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=64, help="requests that wait; more get 429")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of prompt and answer together")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for one answer")
    parser.add_argument("--adapter-memory", type=int, metavar="MB", help="budget of all adapters in memory")
    parser.add_argument("--prefix-memory", type=int, default=256, metavar="MB", help="for beginnings prompts share")
    parser.add_argument("--allow-runtime-lora", metavar="DIR", help="let clients load adapters from this folder")
    parser.add_argument("--state", metavar="FILE", help="remember what clients loaded, for the next start")


def main(args: argparse.Namespace) -> None:
    import os

    from peft_run.errors import UsageError
    from peft_run.packages import require

    require("fastapi", extra="serve")
    require("uvicorn", extra="serve")
    key = args.api_key or os.environ.get("PEFT_API_KEY") or None
    if key is None and args.host not in LOOPBACK:
        raise UsageError("serve.needs_key", host=args.host)
    counts = (("--slots", args.slots, 1), ("--queue", args.queue, 1), ("--max-tokens", args.max_tokens, 1))
    for option, value, least in (*counts, ("--prefix-memory", args.prefix_memory, 0)):
        if value < least:
            raise UsageError("serve.bad_number", option=option, least=least)
    # oneDNN compiles a kernel for every number of rows and keeps 1,024 of them, of some 100 kB each, for lengths of
    # prompts that hardly come again. Read at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    import uvicorn

    from peft_run.serve.api import DRAIN_SECONDS, make_app
    from peft_run.serve.connections import Connection
    from peft_run.serve.start import make_service

    service = make_service(args, key)
    models = ", ".join(model["id"] for model in service.models())
    host = f"[{args.host}]" if ":" in args.host else args.host
    args.console("serve.ready", url=f"http://{host}:{args.port}", models=models)
    uvicorn.run(
        make_app(service),
        host=args.host,
        port=args.port,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=32 << 10,  # headers
        timeout_graceful_shutdown=int(DRAIN_SECONDS),
        log_level="debug" if args.debug else "warning",
        server_header=False,
        proxy_headers=False,
    )
