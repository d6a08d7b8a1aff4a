"""`peft ui`: the whole road as a page in the browser."""

from __future__ import annotations

import argparse

HELP = {"en": "open the whole road as a web page on this machine", "zh": "在本机以网页方式完成整个流程"}
ALIASES = ("webui",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="the workspace; nothing else is touched")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--token", metavar="SECRET", help="or PEFT_UI_TOKEN; other hosts than this one need it")


def main(args: argparse.Namespace) -> None:
    import os

    from peft_run.errors import UsageError
    from peft_run.packages import require

    require("gradio", extra="ui")
    secret = args.token or os.environ.get("PEFT_UI_TOKEN") or None
    from peft_run.ui.gate import LOOPBACK

    if secret is None and args.host not in LOOPBACK:
        raise UsageError("ui.needs_token", host=args.host)
    import uvicorn

    from peft_run.ui.app import make_app
    from peft_run.ui.jobs import Jobs
    from peft_run.ui.workspace import Workspace

    workspace = Workspace(args.folder)
    os.chdir(workspace.root)  # as the commands that the page starts: paths mean the same to both
    jobs = Jobs(workspace, ["--offline"] if args.offline else [])
    app = make_app(workspace, jobs, args.host, secret)
    host = f"[{args.host}]" if ":" in args.host else args.host
    args.console("ui.ready", url=f"http://{host}:{args.port}/", folder=workspace.root)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        ws="none",
        log_level="debug" if args.debug else "warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,  # a browser that watches a run never hangs up by itself
    )
