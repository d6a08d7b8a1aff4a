"""Sweep: a recipe over several values of some of its fields, what came of it, and the best one as a recipe."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from peft_run.config import load
from peft_run.config.load import parse_override
from peft_run.errors import RunError
from peft_run.ui.command import ask, there_is
from peft_run.ui.layout import TICK, Page, document, job_panel, quiet
from peft_run.ui.workspace import RECIPES

# What may be said here; other options and fields name files, which the command line alone may choose freely.
OPTIONS = ("--search", "--trials", "--objective", "--prune", "--seed")
SECTIONS = ("adapter.", "train.", "preference.", "data.fraction")


def build(page: Page) -> None:
    say, workspace = page.say, page.workspace
    if not there_is("sweep"):
        gr.HTML(f"<p>{escape(say('absent', command='peft sweep'))}</p>")
        return
    gr.Markdown(say("sweep_about"))
    recipe = gr.Dropdown(label=say("recipe"), choices=[], elem_id="recipe")
    axes = gr.Textbox(label=say("axes"), placeholder="adapter.r=4,8,16\ntrain.lr=1e-4,5e-4", lines=3, elem_id="axes")
    more = gr.Textbox(label=say("more_options"), placeholder="--search random --trials 8")
    go = gr.Button(say("start"), variant="primary", elem_id="start")
    job_panel(page, "sweep")
    sweep = gr.Dropdown(label=say("sweep"), choices=[], elem_id="sweep")
    best = gr.Button(say("take_best"), elem_id="best")
    result = gr.HTML(elem_id="result")
    timer = gr.Timer(5 * TICK)

    def opened() -> tuple[Any, Any]:
        recipes, sweeps = workspace.recipes(), workspace.sweeps()
        return (
            gr.Dropdown(choices=recipes, value=next(iter(recipes), None)),
            gr.Dropdown(choices=sweeps, value=next(iter(sweeps), None)),
        )

    def begun(recipe: str | None, axes: str, more: str) -> None:
        if not recipe:
            raise RunError("ui.no_recipe")
        file = workspace.inside(recipe)
        workspace.check(load(file))
        words = axes_of(axes) + options_of(more)
        page.jobs.start("sweep", "sweep", workspace.name(file), *words, language=page.language)

    def look(name: str | None) -> tuple[Any, str]:
        sweeps = workspace.sweeps()
        chosen = name if name in sweeps else next(iter(sweeps), None)
        if chosen is None:
            return gr.skip(), ""
        from peft_run.sweep import report
        from peft_run.sweep.folder import Folder
        from peft_run.sweep.results import result as read

        folder = Folder.open(workspace.inside(chosen))
        shown = document(report.make(folder, read(folder), page.language))
        return (gr.skip() if chosen == name else gr.Dropdown(choices=sweeps, value=chosen)), shown

    def taken(name: str | None) -> None:
        if not name:
            raise RunError("ui.no_recipe")
        folder = workspace.inside(name)
        place = workspace.name(workspace.new(RECIPES, f"{folder.parent.name}-best.yaml"))
        answer = ask(page.jobs, "sweep", "best", workspace.name(folder), "-o", place, language=page.language)
        if answer.code:
            raise gr.Error(answer.told, print_exception=False)
        gr.Info(say("best_taken", path=place))

    page.blocks.load(opened, outputs=[recipe, sweep], **quiet())
    gr.on([timer.tick, sweep.change], page.told(look), inputs=sweep, outputs=[sweep, result], **quiet())
    go.click(page.told(begun), inputs=[recipe, axes, more], **quiet())
    best.click(page.told(taken), inputs=sweep, **quiet())


def axes_of(text: str) -> list[str]:
    """A line an axis. Raises RunError for fields that are not of the method or the training."""
    words = []
    for line in filter(None, map(str.strip, text.splitlines())):
        field = ".".join(parse_override(line, Path.cwd())[0])
        if not field.startswith(SECTIONS):
            raise RunError("ui.not_here", option=field)
        words += ["--axis", line]
    return words


def options_of(text: str) -> list[str]:
    """`--trials 8 --seed=1`. Raises RunError for all but the options that are allowed here."""
    words = [part for word in shlex.split(text) for part in word.split("=", 1)]
    for name in words[::2]:
        if name not in OPTIONS:
            raise RunError("ui.not_here", option=name)
    return words
