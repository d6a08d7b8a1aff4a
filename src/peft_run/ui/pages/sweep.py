"""Sweep: a recipe over several values of some of its fields."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from peft_run.errors import RunError
from peft_run.ui.command import there_is
from peft_run.ui.layout import Page, job_panel, quiet


def build(page: Page) -> None:
    say, workspace = page.say, page.workspace
    if not there_is("sweep"):
        gr.HTML(f"<p>{escape(say('absent', command='peft sweep'))}</p>")
        return
    gr.Markdown(say("sweep_about"))
    recipe = gr.Dropdown(label=say("recipe"), choices=[], elem_id="recipe")
    axes = gr.Textbox(label=say("axes"), placeholder="adapter.r=4,8,16\ntrain.lr=1e-4,5e-4", lines=3, elem_id="axes")
    more = gr.Textbox(label=say("more_options"), placeholder="--parallel 1")
    go = gr.Button(say("start"), variant="primary", elem_id="start")
    job_panel(page, "sweep")

    def opened() -> Any:
        names = workspace.recipes()
        return gr.Dropdown(choices=names, value=next(iter(names), None))

    def begun(recipe: str | None, axes: str, more: str) -> None:
        import shlex

        from peft_run.config import load

        if not recipe:
            raise RunError("ui.no_recipe")
        file = workspace.inside(recipe)
        workspace.check(load(file))
        words = ["sweep", workspace.name(file)]
        for line in axes.splitlines():
            if line.strip():
                words += ["--axis", line.strip()]
        page.jobs.start("sweep", *words, *shlex.split(more), language=page.language)

    page.blocks.load(opened, outputs=recipe, **quiet())
    go.click(page.told(begun), inputs=[recipe, axes, more], **quiet())
