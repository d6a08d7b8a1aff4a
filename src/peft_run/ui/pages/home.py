"""Home: the newest runs and commands, and what this machine can do."""

from __future__ import annotations

import threading
import time
from html import escape
from typing import Any

import gradio as gr

from peft_run.run import STATUS
from peft_run.ui.command import Answer, ask
from peft_run.ui.jobs import state_of
from peft_run.ui.layout import TICK, Page, quiet, state, table, wrong

SHOWN = 8


def build(page: Page) -> None:
    say = page.say
    gr.Markdown(say("home_about"))
    recent = gr.HTML(elem_id="recent")
    with gr.Row():
        gr.Markdown(f"### {say('doctor')}")
        again = gr.Button(say("doctor_again"), size="sm")
    checks = gr.HTML(f"<p>{escape(say('wait'))}</p>", elem_id="doctor")

    def newest() -> str:
        names = page.workspace.runs()[:SHOWN]
        jobs = page.jobs.all()[:SHOWN]
        if not names and not jobs:
            return f"<p>{escape(say('nothing_yet'))} {page.link('train', say('page_train'))}</p>"
        parts = [f"<h3>{escape(say('recent_runs'))}</h3><ul>"] if names else []
        for name in names:
            run = page.workspace.run(name)
            stage = run.read_json(STATUS, {}).get("stage", "")
            parts.append(f"<li>{page.link('runs', name, run=name)} {state(page, state_of(run))} {escape(stage)}</li>")
        parts.append(f"</ul><h3>{escape(say('recent_jobs'))}</h3><ul>" if names else "<ul>")
        for job in jobs:
            at = time.strftime("%m-%d %H:%M", time.localtime(job.asked["at"]))
            parts.append(f"<li>{at} {state(page, job.state)} <code>{escape(job.command)}</code></li>")
        return f'<div class="peft-doc">{"".join(parts)}</ul></div>'

    doctor = Doctor(page)
    timer = gr.Timer(TICK)

    def checked() -> tuple[Any, Any]:
        answer = doctor.answer
        if answer is None:
            return gr.skip(), gr.skip()
        return shown(page, answer), gr.Timer(active=False)

    def check_again() -> tuple[Any, Any]:
        doctor.ask()
        return f"<p>{escape(say('wait'))}</p>", gr.Timer(active=True)

    page.blocks.load(newest, outputs=recent, **quiet())
    timer.tick(checked, outputs=[checks, timer], **quiet())
    again.click(check_again, outputs=[checks, timer], **quiet())


class Doctor:
    """`peft doctor`, asked in the background when it is first wanted: it imports torch, which takes its time."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.known: Answer | None = None
        self.thread: threading.Thread | None = None

    @property
    def answer(self) -> Answer | None:
        if self.known is None and self.thread is None:
            self.ask()
        return self.known

    def ask(self) -> None:
        self.known = None
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        self.known = ask(self.page.jobs, "doctor", language=self.page.language)


def shown(page: Page, answer: Answer) -> str:
    if answer.result is None:
        return wrong(answer.told)
    rows = []
    for name, value in answer.result.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {inner}" for key, inner in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append([name, str(value)])
    return table(["", page.workspace.root.name], rows)
