"""Chat: one question to a base model and several adapters, answered side by side as the words come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr

from peft_run.chat import save_sample
from peft_run.errors import RunError
from peft_run.ui import client
from peft_run.ui.client import Server
from peft_run.ui.layout import TICK, Page, quiet, state
from peft_run.ui.workspace import DATA

COLUMNS = 4
SAMPLES = f"{DATA}/chat-samples.jsonl"
PAUSE = 0.1  # seconds between two updates of the page

Messages = list[dict[str, str]]


def build(page: Page) -> None:
    say, workspace, jobs = page.say, page.workspace, page.jobs
    gr.Markdown(say("chat_about"))
    runs = gr.Dropdown(label=say("runs_to_serve"), choices=[], multiselect=True, elem_id="runs")
    go = gr.Button(say("load_models"), elem_id="load")
    status = gr.HTML(elem_id="status")
    server = gr.State(None)  # the job that answers
    models = gr.CheckboxGroup(label=say("who_answers"), choices=[], elem_id="models")
    with gr.Row(equal_height=False):
        columns = [
            gr.Chatbot(
                label="-",
                visible=False,
                height=380,
                render_markdown=False,
                min_width=240,
                buttons=["copy"],
                elem_id=f"chat{i}",
            )
            for i in range(COLUMNS)
        ]
    histories = gr.State([])  # one conversation a column
    text = gr.Textbox(show_label=False, placeholder=say("ask"), elem_id="ask", lines=1)
    send = gr.Button(say("send"), variant="primary", elem_id="send")
    with gr.Row():
        new = gr.Button(say("new_chat"), min_width=120)
        cancel = gr.Button(say("stop_answer"), min_width=120)
        best = gr.Dropdown(label=say("answer_of"), choices=[], min_width=160)
        keep = gr.Button(say("save_sample"), elem_id="keep", min_width=160)
    with gr.Accordion(say("settings"), open=False), gr.Row():
        temperature = gr.Slider(0, 2, value=0, step=0.1, label=say("temperature"))
        length = gr.Slider(1, 1024, value=128, step=1, label=say("max_tokens"))
    timer = gr.Timer(TICK)

    def opened() -> tuple[Any, ...]:
        names = workspace.finished()
        return gr.Dropdown(choices=names, value=names[:2]), *found(None, [])

    def begun(runs: list[str]) -> tuple[Any, ...]:
        if not runs:
            raise RunError("serve.nothing")
        started = client.start(
            jobs, [workspace.name(workspace.run(run).path) for run in runs], None, None, page.language
        )
        return found(started.job.id, [])

    def found(chosen: str | None, before: list[str]) -> tuple[Any, ...]:
        """How the chosen server stands, and whom one can ask there."""
        job = jobs.get(chosen) if chosen else next(iter(jobs.all(client.KIND)), None)
        if job is None:
            return f"<p>{escape(say('chat_needs_server'))}</p>", None, gr.skip(), gr.skip()
        names = [model["id"] for model in Server(job).models()] if job.is_on else []
        if names:
            shown = f"<p>{escape(say('chat_ready', models=', '.join(names)))}</p>"
        elif job.is_on:
            shown = f"<p>{state(page, 'starting')} {escape(say('chat_loading'))}</p>"
        else:
            shown = f"<p>{state(page, job.state)}</p><pre class='peft-error'>{escape(job.log()[-2000:])}</pre>"
        if names == before:
            return shown, gr.skip(), gr.skip(), before
        return shown, job.id, gr.CheckboxGroup(choices=names, value=names[:COLUMNS]), names

    def arranged(models: list[str]) -> tuple[Any, ...]:
        """A column for each who answers; conversations begin anew."""
        chosen = models[:COLUMNS]
        boxes = [
            gr.Chatbot(visible=i < len(chosen), label=chosen[i] if i < len(chosen) else "-", value=[])
            for i in range(COLUMNS)
        ]
        value = chosen[-1] if chosen else None
        return *boxes, [[] for _ in chosen], gr.Dropdown(choices=chosen, value=value)

    async def asked(
        text: str, id: str | None, models: list[str], histories: list[Messages], temperature: float, length: int
    ) -> AsyncIterator[tuple[Any, ...]]:
        job = jobs.get(id or "")
        if job is None or not job.is_on or not models:
            raise gr.Error(say("no_server"), print_exception=False)
        if not text.strip():
            return
        histories = [[*history, {"role": "user", "content": text.strip()}] for history in histories]
        async for answers in together(Server(job), models[:COLUMNS], histories, temperature, int(length)):
            now = [[*h, {"role": "assistant", "content": a}] for h, a in zip(histories, answers)]
            yield *shown(now), now, ""

    def shown(histories: list[Messages]) -> list[Any]:
        return [histories[i] if i < len(histories) else gr.skip() for i in range(COLUMNS)]

    def cleared(models: list[str]) -> tuple[Any, ...]:
        return *([[]] * COLUMNS), [[] for _ in models[:COLUMNS]]

    def saved(models: list[str], histories: list[Messages], best: str | None) -> None:
        place = models.index(best) if best in models else 0
        if place >= len(histories) or len(histories[place]) < 2:
            raise RunError("ui.nothing_to_save")
        save_sample(workspace.inside(SAMPLES), histories[place])
        gr.Info(say("sample_saved", path=SAMPLES))

    known = gr.State([])
    outputs = [status, server, models, known]
    page.blocks.load(opened, outputs=[runs, *outputs], **quiet())
    go.click(page.told(begun), inputs=runs, outputs=outputs, **quiet())
    timer.tick(found, inputs=[server, known], outputs=outputs, **quiet())
    models.change(arranged, inputs=models, outputs=[*columns, histories, best], **quiet())
    asking = gr.on(
        [send.click, text.submit],
        asked,
        inputs=[text, server, models, histories, temperature, length],
        outputs=[*columns, histories, text],
        **quiet(),
    )
    cancel.click(None, cancels=[asking], **quiet())
    gr.on(
        [new.click, *(column.clear for column in columns)],
        cleared,
        inputs=models,
        outputs=[*columns, histories],
        **quiet(),
    )
    keep.click(page.told(saved), inputs=[models, histories, best], **quiet())


async def together(
    server: Server, models: list[str], histories: list[Messages], temperature: float, length: int
) -> AsyncIterator[list[str]]:
    """The answers so far, one a model, each time some of them have grown. A refusal stands in the answer's place."""
    answers = [""] * len(models)

    async def follow(i: int) -> None:
        try:
            async for piece in server.chat(models[i], histories[i], temperature, length):
                answers[i] += piece
        except RunError as error:
            answers[i] += f"[{error}]"

    tasks = [asyncio.create_task(follow(i)) for i in range(len(models))]
    try:
        before: list[str] | None = None
        while True:
            pending = [task for task in tasks if not task.done()]
            if answers != before or not pending:
                before = list(answers)
                yield before
            if not pending:
                return
            await asyncio.wait(pending, timeout=PAUSE)
    finally:
        for task in tasks:
            task.cancel()
