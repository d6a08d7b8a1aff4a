"""Home: the newest runs and commands, and what this machine can do."""

from __future__ import annotations

import time
from html import escape

import gradio as gr

from peft_run.run import STATUS
from peft_run.ui.command import Answer, ask
from peft_run.ui.jobs import state_of
from peft_run.ui.layout import Page, quiet, state, table, wrong

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

    def doctor() -> str:
        return shown(page, ask(page.jobs, "doctor", language=page.language))

    page.blocks.load(newest, outputs=recent, **quiet())
    page.blocks.load(doctor, outputs=checks, **quiet())
    again.click(doctor, outputs=checks, api_visibility="private")


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
