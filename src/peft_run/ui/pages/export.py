"""Merge and export: a finished run as a folder that other programs load, each proven by the command that writes it."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from peft_run.ui.layout import TICK, Page, job_panel, quiet, table
from peft_run.ui.workspace import EXPORTS

TARGETS = ("hf", "gguf", "ollama", "vllm")
TYPES = ("F16", "Q8_0")


def build(page: Page) -> None:
    say, workspace = page.say, page.workspace
    gr.Markdown(say("export_about"))
    with gr.Row():
        run = gr.Dropdown(label=say("run"), choices=[], elem_id="run", scale=2)
        to = gr.Dropdown(label=say("target"), choices=[(say(f"to_{t}"), t) for t in TARGETS], value="hf", elem_id="to")
        kind = gr.Dropdown(label=say("gguf_type"), choices=list(TYPES), value="F16", visible=False)
        name = gr.Textbox(label=say("folder_name"), value="my-model", elem_id="name")
    go = gr.Button(say("export"), variant="primary", elem_id="export")
    job_panel(page, "export")
    gr.Markdown(f"### {say('exports')}")
    there = gr.HTML(elem_id="exports")
    timer = gr.Timer(2 * TICK)

    def opened(request: gr.Request) -> Any:
        names = workspace.finished()
        asked = request.query_params.get("run")
        return gr.Dropdown(choices=names, value=asked if asked in names else next(iter(names), None))

    def begun(run: str | None, to: str, kind: str, name: str) -> None:
        source = workspace.name(workspace.run(run or "").path)
        place = workspace.name(workspace.new(EXPORTS, name))
        if to == "hf":
            words = ["merge", source, "-o", place]
        else:
            words = ["export", source, "--to", to, "--type", kind, "-o", place]
        page.jobs.start("export", *words, language=page.language)

    def listed() -> str:
        rows = []
        for folder in workspace.exports():
            files = [file for file in sorted((workspace.root / folder).rglob("*")) if file.is_file()]
            sizes = "\n".join(f"{file.name}  {file.stat().st_size / 1e6:.1f} MB" for file in files)
            rows.append([str(workspace.root / folder), sizes])
        return table([say("folder"), say("files")], rows) if rows else f"<p>{escape(say('no_exports'))}</p>"

    page.blocks.load(opened, outputs=run, **quiet())
    page.blocks.load(listed, outputs=there, **quiet())
    timer.tick(listed, outputs=there, **quiet())
    to.change(lambda to: gr.Dropdown(visible=to in ("gguf", "ollama")), inputs=to, outputs=kind, **quiet())
    go.click(page.told(begun), inputs=[run, to, kind, name], **quiet())
