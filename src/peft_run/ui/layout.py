"""What all pages share: the look, the links between them, tables and charts as HTML, and the panel of a job."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from peft_run.document import Document
from peft_run.errors import RunError
from peft_run.messages import LANGUAGES, sentence
from peft_run.svg import Line, chart
from peft_run.ui.jobs import Job, Jobs
from peft_run.ui.workspace import Workspace

NAMES = {"en": "English", "zh": "中文"}
TICK = 2.0  # seconds between two looks at the files
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"]
CSS = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: none is fetched."""
    return gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONO)


class Page:
    """What the builder of a page gets: the workspace, its jobs, and the language of all that it says."""

    def __init__(self, workspace: Workspace, jobs: Jobs, language: str, route: str, blocks: gr.Blocks) -> None:
        self.workspace, self.jobs, self.language, self.route = workspace, jobs, language, route
        self.blocks = blocks  # of this page alone: `load` is when a browser opens it

    def say(self, key: str, /, **values: object) -> str:
        return sentence(f"ui.{key}", self.language, **values)

    def told(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with what a command would print as an error shown to the browser."""

        @functools.wraps(function)
        def careful(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except RunError as error:
                raise gr.Error(error.tell(self.language), print_exception=False) from error
            except OSError as error:
                raise gr.Error(f"{error.filename or ''} {error.strerror}", print_exception=False) from error

        return careful

    def link(self, route: str, text: str, **query: str) -> str:
        return f'<a href="/{self.language}/{route}{"?" + urlencode(query) if query else ""}">{escape(text)}</a>'


def head(page: Page, routes: Sequence[str]) -> None:
    """Links to all pages, and to this one in the other language."""
    links = []
    for route in routes:
        current = ' aria-current="page"' if route == page.route else ""
        name = page.say("page_home" if not route else f"page_{route}")
        links.append(f'<a href="/{page.language}/{route}"{current}>{escape(name)}</a>')
    other = next(language for language in LANGUAGES if language != page.language)
    links.append(f'<a class="peft-language" href="/{other}/{page.route}" lang="{other}">{NAMES[other]}</a>')
    gr.HTML(f'<nav class="peft-top"><b>peft</b>{"".join(links)}</nav>')


# -- HTML -------------------------------------------------------------------------------------------------------------


def document(filled: Document) -> str:
    return f'<div class="peft-doc">{filled.body()}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    page = Document("", "en")
    page.table(header, rows)
    return document(page)


def curves(charts: Iterable[tuple[str, Sequence[Line]]], axis: str) -> str:
    drawn = "".join(f'<div class="peft-chart">{chart(title, lines, axis)}</div>' for title, lines in charts)
    return f'<div class="peft-charts">{drawn}</div>'


def cards(values: dict[str, str]) -> str:
    """name -> value, the value as HTML."""
    boxes = "".join(f"<div><small>{escape(name)}</small>{value}</div>" for name, value in values.items())
    return f'<div class="peft-cards">{boxes}</div>'


def state(page: Page, name: str) -> str:
    return f'<span class="peft-state {escape(name)}">{escape(page.say(f"state_{name}"))}</span>'


def wrong(text: str) -> str:
    return f'<p class="peft-error">{escape(text)}</p>' if text else ""


def log_box(page: Page, lines: int = 10) -> gr.Textbox:
    return gr.Textbox(label=page.say("log"), lines=lines, max_lines=lines, interactive=False, elem_classes=["peft-log"])


# -- the panel of a job -----------------------------------------------------------------------------------------------


def quiet() -> dict[str, Any]:
    """Settings of events that happen by themselves."""
    return {"show_progress": "hidden", "api_visibility": "private"}


def job_panel(page: Page, *kinds: str) -> None:
    """The newest job of these kinds: its command, how it stands, what it says, and a button that stops it."""
    status = gr.HTML()
    log = log_box(page)
    stop = gr.Button(page.say("stop"), visible=False)
    timer = gr.Timer(TICK)

    def newest() -> Job | None:
        return next(iter(page.jobs.all(*kinds)), None)

    def look() -> tuple[Any, Any, Any]:
        job = newest()
        if job is None:
            return f"<p>{escape(page.say('no_job'))}</p>", "", gr.Button(visible=False)
        shown = f"<p>{state(page, job.state)} <code>{escape(job.command)}</code></p>"
        return shown, job.log() + job.out(), gr.Button(visible=job.is_on)

    def end() -> tuple[Any, Any, Any]:
        job = newest()
        if job is not None:
            job.stop()
        return look()

    outputs = [status, log, stop]
    timer.tick(look, outputs=outputs, **quiet())
    page.blocks.load(look, outputs=outputs, **quiet())
    stop.click(end, outputs=outputs, **quiet())
