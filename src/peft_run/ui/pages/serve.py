"""Serve: start and stop servers, load and unload adapters while they run, and how programs reach them."""

from __future__ import annotations

from html import escape
from pathlib import PurePosixPath
from typing import Any

import gradio as gr

from peft_run.errors import RunError
from peft_run.ui import client
from peft_run.ui.client import Server
from peft_run.ui.layout import TICK, Page, job_panel, quiet, table


def build(page: Page) -> None:
    say, workspace, jobs = page.say, page.workspace, page.jobs
    gr.Markdown(say("serve_about"))
    with gr.Row():
        runs = gr.Dropdown(label=say("runs_to_serve"), choices=[], multiselect=True, elem_id="runs", scale=2)
        base = gr.Dropdown(label=say("base_alone"), choices=[], allow_custom_value=True, value="")
        port = gr.Number(label=say("port"), precision=0, value=0, info=say("port_free"), min_width=120)
    go = gr.Button(say("start"), variant="primary", elem_id="start")
    servers = gr.HTML(elem_id="servers")
    job_panel(page, client.KIND)
    with gr.Accordion(say("load_adapters"), open=False):
        with gr.Row():
            server = gr.Dropdown(label=say("server"), choices=[], elem_id="server")
            adapter = gr.Dropdown(label=say("run"), choices=[], elem_id="adapter")
            name = gr.Textbox(label=say("served_as"))
        with gr.Row():
            load = gr.Button(say("load"))
            unload = gr.Button(say("unload"))
            halt = gr.Button(say("stop_server"))
    with gr.Accordion(say("snippets"), open=True):
        curl = gr.Code(label="curl", language="shell", interactive=False, elem_id="curl")
        python = gr.Code(label="Python", language="python", interactive=False, elem_id="python")
    timer = gr.Timer(2 * TICK)

    def opened() -> tuple[Any, ...]:
        names = workspace.finished()
        return (
            gr.Dropdown(choices=names, value=names[:1]),
            gr.Dropdown(choices=["", *workspace.models()]),
            gr.Dropdown(choices=names, value=next(iter(names), None)),
        )

    def begun(runs: list[str], base: str, port: float | None) -> None:
        chosen = [workspace.name(workspace.run(run).path) for run in runs or []]
        if not chosen and not base:
            raise RunError("serve.nothing")
        if base:
            workspace.check_model(base)
        client.start(jobs, chosen, base or None, int(port or 0) or None, page.language)

    def look() -> tuple[Any, ...]:
        on = client.running(jobs)
        rows = [[one.url, models_text(one), one.job.command] for one in on]
        shown = table([say("address"), say("models"), say("command")], rows) if on else ""
        first = next(iter(on), None)
        snippets = (curl_text(first), python_text(first)) if first else ("", "")
        return shown or f"<p>{escape(say('no_server'))}</p>", *snippets

    def models_text(one: Server) -> str:
        names = [model["id"] for model in one.models()]
        return ", ".join(names) or say(f"state_{one.job.state}")

    def listed(chosen: str | None) -> Any:
        ids = [(one.url, one.job.id) for one in client.running(jobs)]
        value = chosen if chosen in [id for _, id in ids] else (ids[0][1] if ids else None)
        return gr.Dropdown(choices=ids, value=value)

    def server_of(id: str | None) -> Server:
        job = jobs.get(id or "")
        if job is None or not job.is_on:
            raise RunError("ui.no_server")
        return Server(job)

    def loaded(id: str | None, run: str | None, name: str) -> tuple[Any, ...]:
        path = workspace.name(workspace.run(run or "").path)
        server_of(id).load(name or PurePosixPath(path).parent.name, path)
        gr.Info(say("loaded"))
        return look()

    def unloaded(id: str | None, run: str | None, name: str) -> tuple[Any, ...]:
        server_of(id).unload(name or (PurePosixPath(run).parent.name if run else ""))
        return look()

    def halted(id: str | None) -> tuple[Any, ...]:
        server_of(id).job.stop()
        return look()

    outputs = [servers, curl, python]
    page.blocks.load(opened, outputs=[runs, base, adapter], **quiet())
    page.blocks.load(look, outputs=outputs, **quiet())
    timer.tick(look, outputs=outputs, **quiet())
    server.focus(listed, inputs=server, outputs=server, **quiet())
    page.blocks.load(listed, inputs=server, outputs=server, **quiet())
    go.click(page.told(begun), inputs=[runs, base, port], **quiet()).then(
        listed, inputs=server, outputs=server, **quiet()
    )
    load.click(page.told(loaded), inputs=[server, adapter, name], outputs=outputs, **quiet())
    unload.click(page.told(unloaded), inputs=[server, adapter, name], outputs=outputs, **quiet())
    halt.click(page.told(halted), inputs=server, outputs=outputs, **quiet())


def model_of(server: Server) -> str:
    names = [model["id"] for model in server.models()]
    return names[-1] if names else "MODEL"


def curl_text(server: Server) -> str:
    return (
        f"curl {server.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"  -H 'authorization: Bearer {server.job.more['key']}' \\\n"
        f'  -d \'{{"model": "{model_of(server)}", "messages": [{{"role": "user", "content": "hi"}}]}}\''
    )


def python_text(server: Server) -> str:
    return (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{server.url}/v1", api_key="{server.job.more["key"]}")\n'
        "answer = client.chat.completions.create(\n"
        f'    model="{model_of(server)}", messages=[{{"role": "user", "content": "hi"}}]\n'
        ")\n"
        "print(answer.choices[0].message.content)"
    )
