"""What all pages share: the look, the links between them, tables and charts as HTML, and the panel of a job."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

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
CSS = """
.nav-holder{display:none}
.peft-top{display:flex;flex-wrap:wrap;gap:.25rem .9rem;align-items:baseline;border-bottom:1px solid var(--border-color-primary);padding-bottom:.6rem}
.peft-top b{font-size:1.15rem;margin-right:.4rem}
.peft-top a{color:var(--body-text-color-subdued);text-decoration:none;padding:.15rem 0}
.peft-top a:hover{color:var(--body-text-color)}
.peft-top a[aria-current]{color:var(--body-text-color);font-weight:600;border-bottom:2px solid var(--color-accent)}
.peft-top .peft-language{margin-left:auto}
.peft-doc{overflow-wrap:anywhere}
.peft-doc .wide,.peft-chart{overflow-x:auto}
.peft-doc table{border-collapse:collapse;margin:.5rem 0;font-size:.92rem}
.peft-doc th,.peft-doc td{border:1px solid var(--border-color-primary);padding:.3rem .55rem;text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;min-width:4rem}
.peft-doc th{background:var(--background-fill-secondary)}
.peft-doc h2{font-size:1.05rem;margin:1.2rem 0 .3rem}
.peft-doc figure{margin:.5rem 0}
.peft-doc figcaption{display:none}
.peft-doc .good{color:#0a7038;font-weight:600}.peft-doc .bad{color:#b3261e;font-weight:600}
.dark .peft-doc .good{color:#5fd08f}.dark .peft-doc .bad{color:#ff8a80}
.peft-charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:.8rem}
.peft-chart svg,.peft-doc figure svg{width:100%;min-width:420px;height:auto;border-radius:6px}
.peft-doc figure{overflow-x:auto;max-width:720px}
.peft-cards{display:flex;flex-wrap:wrap;gap:.5rem}
.peft-cards div{border:1px solid var(--border-color-primary);border-radius:6px;padding:.3rem .7rem;min-width:6rem}
.peft-cards small{display:block;color:var(--body-text-color-subdued)}
.peft-state{font-weight:600}
.peft-state.running,.peft-state.starting{color:#2563eb}.peft-state.done{color:#0a7038}
.peft-state.failed,.peft-state.lost{color:#b3261e}.peft-state.interrupted{color:#b45309}
.dark .peft-state.running,.dark .peft-state.starting{color:#7aa7ff}.dark .peft-state.done{color:#5fd08f}
.dark .peft-state.failed,.dark .peft-state.lost{color:#ff8a80}.dark .peft-state.interrupted{color:#f5b461}
.peft-sample{border:1px solid var(--border-color-primary);border-radius:6px;padding:.6rem .8rem;margin:.5rem 0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.95rem}
.peft-sample mark{background:#bbf7d0;color:#052e16;border-radius:2px}
.dark .peft-sample mark{background:#14532d;color:#dcfce7}
.peft-error{color:#b3261e;white-space:pre-wrap;overflow-wrap:anywhere}
.dark .peft-error{color:#ff8a80}
.peft-bar{display:flex;height:1.6rem;border-radius:4px;overflow:hidden;background:var(--background-fill-secondary);border:1px solid var(--border-color-primary)}
.peft-bar span{display:block;height:100%}
.peft-key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.4rem 0;font-size:.9rem}
.peft-key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.3rem;vertical-align:-.1rem}
.peft-log textarea{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.82rem}
"""


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
        from urllib.parse import urlencode

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
    return f'<div class="peft-cards">{"".join(f"<div><small>{escape(k)}</small>{v}</div>" for k, v in values.items())}</div>'


def state(page: Page, name: str) -> str:
    return f'<span class="peft-state {escape(name)}">{escape(page.say(f"state_{name}"))}</span>'


def wrong(text: str) -> str:
    return f'<p class="peft-error">{escape(text)}</p>' if text else ""


def log_box(page: Page, lines: int = 10) -> gr.Textbox:
    return gr.Textbox(label=page.say("log"), lines=lines, max_lines=lines, interactive=False, elem_classes=["peft-log"])


# -- the panel of a job -------------------------------------------------------------------------------------------------


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
