"""The application: the pages in each language under /en and /zh, behind the gate."""

from __future__ import annotations

import os
import shutil
from typing import Any

from peft_run.messages import LANGUAGES
from peft_run.ui.gate import Gate, language_of
from peft_run.ui.jobs import Jobs
from peft_run.ui.workspace import JOBS, UPLOADS, Workspace

ROUTES = ("", "data", "train", "runs", "sweep", "evaluate", "chat", "export", "serve")
LARGEST_UPLOAD = "2gb"
AT_ONCE = 16  # handlers


def make_app(workspace: Workspace, jobs: Jobs, host: str, secret: str | None) -> Gate:
    """The ASGI application. secret: what a browser must show; None where everybody may come in."""
    settle(workspace)
    import gradio as gr
    from fastapi import FastAPI, Request
    from fastapi.responses import RedirectResponse, Response

    from peft_run.ui.layout import CSS, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/")
    async def begin(request: Request) -> RedirectResponse:
        return RedirectResponse(f"/{language_of(request.headers.get('accept-language', ''))}/")

    for language in LANGUAGES:
        app = gr.mount_gradio_app(
            app,
            blocks(workspace, jobs, language),
            path=f"/{language}",
            theme=theme(),
            css=CSS,
            footer_links=[],
            allowed_paths=[],
            blocked_paths=[str(workspace.root / JOBS)],
            max_file_size=LARGEST_UPLOAD,
            ssr_mode=False,
            show_error=True,
        )
    return Gate(app, host, secret)


def settle(workspace: Workspace) -> None:
    """What Gradio reads from the environment when it is imported: report nothing, put files into the workspace."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    uploads = workspace.root / UPLOADS
    shutil.rmtree(uploads, ignore_errors=True)  # what was uploaded before was copied to where it belongs
    uploads.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)


def blocks(workspace: Workspace, jobs: Jobs, language: str) -> Any:
    """All pages in one language."""
    import importlib

    import gradio as gr

    from peft_run.messages import sentence
    from peft_run.ui.layout import Page, head

    def fill(route: str) -> None:
        page = Page(workspace, jobs, language, route, main)
        head(page, ROUTES)
        importlib.import_module(f"peft_run.ui.pages.{route or 'home'}").build(page)

    first, *others = ROUTES
    with gr.Blocks(title=sentence("ui.title", language), analytics_enabled=False) as main:
        fill(first)
    for route in others:
        with main.route(sentence(f"ui.page_{route}", language), f"/{route}", show_in_navbar=False):
            fill(route)
    main.queue(default_concurrency_limit=AT_ONCE, api_open=False)
    return main
