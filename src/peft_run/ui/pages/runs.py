"""Runs: live curves and the log of any run in the workspace, stop and resume, and what two recipes differ in.

All that is shown is read from the run's folder, so it is whole however often the browser or this server was gone.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

import gradio as gr

from peft_run.plots import charts
from peft_run.progress import clock_time
from peft_run.run import CONFIG, STATUS, Run
from peft_run.ui.jobs import GONE, state_of, stop_run, tail
from peft_run.ui.layout import TICK, Page, cards, curves, log_box, quiet, state, table, wrong

POINTS = 2000  # of a curve


def build(page: Page) -> None:
    say, workspace = page.say, page.workspace
    known = gr.State([])
    run = gr.Dropdown(label=say("run"), choices=[], elem_id="run")
    summary = gr.HTML(elem_id="summary")
    with gr.Row():
        stop = gr.Button(say("stop_saving"), visible=False, elem_id="stop")
        resume = gr.Button(say("resume"), visible=False, variant="primary", elem_id="resume")
    drawn = gr.HTML(elem_id="curves")
    log = log_box(page)
    with gr.Accordion(say("recipe"), open=False):
        config = gr.Code(language="yaml", interactive=False, max_lines=30, show_label=False)
    with gr.Accordion(say("compare_recipes"), open=False):
        other = gr.Dropdown(label=say("other_run"), choices=[])
        difference = gr.HTML(elem_id="difference")
    timer = gr.Timer(TICK)
    shown = [summary, drawn, log, stop, resume]

    def opened(request: gr.Request) -> tuple[Any, ...]:
        names = workspace.runs()
        asked = request.query_params.get("run")
        name = asked if asked in names else next(iter(names), None)
        return gr.Dropdown(choices=names, value=name), gr.Dropdown(choices=names), names, *look(name)

    def ticked(name: str | None, before: list[str]) -> tuple[Any, ...]:
        names = workspace.runs()
        if names == before:
            return gr.skip(), gr.skip(), gr.skip(), *look(name)
        if name not in names or name in before[:1]:  # who watches the newest run, goes on to the next one
            name = next(iter(names), None)
        return gr.Dropdown(choices=names, value=name), gr.Dropdown(choices=names), names, *look(name)

    def look(name: str | None) -> tuple[Any, ...]:
        if not name:
            text = f"<p>{escape(say('no_runs'))} {page.link('train', say('page_train'))}</p>"
            return text, "", "", gr.Button(visible=False), gr.Button(visible=False)
        opened_run = workspace.run(name)
        now = state_of(opened_run)
        events = opened_run.events()
        found = charts(thinned(events), page.language).values()
        pictures = curves(found, say("step")) if events else ""
        can_resume = now in (GONE, "interrupted", "failed") and not (opened_run / "artefact.json").is_file()
        return (
            facts(page, opened_run, now, events),
            pictures,
            tail(opened_run / "run.log"),
            gr.Button(visible=now == "running"),
            gr.Button(visible=can_resume),
        )

    def chosen(name: str | None) -> str:
        return (workspace.run(name) / CONFIG).read_text(encoding="utf-8") if name else ""

    def end(name: str) -> tuple[Any, ...]:
        stop_run(workspace.run(name))
        return look(name)

    def go_on(name: str) -> tuple[Any, ...]:
        found = workspace.run(name)
        page.jobs.start("train", "train", "--resume", workspace.name(found.path), language=page.language)
        gr.Info(say("resuming"))
        return look(name)

    def compared(name: str | None, second: str | None) -> str:
        return differences(page, workspace.run(name), workspace.run(second)) if name and second else ""

    page.blocks.load(opened, outputs=[run, other, known, *shown], **quiet())
    timer.tick(page.told(ticked), inputs=[run, known], outputs=[run, other, known, *shown], **quiet())
    run.change(page.told(look), inputs=run, outputs=shown, **quiet())
    run.change(page.told(chosen), inputs=run, outputs=config, **quiet())
    gr.on([run.change, other.change], page.told(compared), inputs=[run, other], outputs=difference, **quiet())
    stop.click(page.told(end), inputs=run, outputs=shown, **quiet())
    resume.click(page.told(go_on), inputs=run, outputs=shown, **quiet())


def thinned(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every so manieth step, so that the curve of a long run stays a picture and not a file; all evaluations."""
    stride = math.ceil(sum("loss" in event for event in events) / POINTS) or 1
    return [event for i, event in enumerate(events) if "loss" not in event or i % stride == 0]


def facts(page: Page, run: Run, now: str, events: list[dict[str, Any]]) -> str:
    status = run.read_json(STATUS, {})
    steps = [event for event in events if "loss" in event]
    evaluations = [event for event in events if "eval_loss" in event]
    values = {page.say("state"): state(page, now) + f" {escape(status.get('stage', ''))}"}
    if steps:
        total = next((f" / {event['total']}" for event in reversed(events) if "total" in event), "")
        values[page.say("step")] = f'<span id="step">{steps[-1]["step"]}</span>{total}'
        values[page.say("loss")] = f"{steps[0]['loss']:.4f} → {steps[-1]['loss']:.4f}"
    if evaluations:
        values[page.say("held_out")] = f"{min(event['eval_loss'] for event in evaluations):.4f}"
    if steps:
        values[page.say("speed")] = f"{steps[-1]['tokens_per_second']:.0f}"
        values[page.say("memory")] = f"{steps[-1]['memory_mb']:.0f} MB"
    seconds = run.read_json("metrics.json", {}).get("train", {}).get("seconds")
    if seconds is not None:
        values[page.say("seconds")] = clock_time(seconds)
    return cards(values) + wrong(status.get("error") or "")


def differences(page: Page, run: Run, other: Run) -> str:
    """The fields that two recipes differ in."""
    from peft_run.compare.collect import Entry, recipes
    from peft_run.compare.page import shown

    rows = [[field, *map(shown, values)] for field, values in recipes([Entry(run), Entry(other)]).items()]
    if not rows:
        return f"<p>{escape(page.say('same_recipe'))}</p>"
    return table([page.say("field"), *(page.workspace.name(one.path) for one in (run, other))], rows)
