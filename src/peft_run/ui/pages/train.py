"""Train: recipe, model, data, method; the YAML and the command that come of them; the memory plan; and the start."""

from __future__ import annotations

from html import escape
from typing import Any, get_args

import gradio as gr

from peft_run.base import PACKAGED
from peft_run.config import Recipe, load
from peft_run.config.help import explain
from peft_run.config.schema import Task
from peft_run.errors import RunError
from peft_run.files import write_text
from peft_run.method_notes import NOTES
from peft_run.ui import drafts, plan
from peft_run.ui.command import ask, there_is
from peft_run.ui.layout import Page, job_panel, quiet, wrong
from peft_run.ui.workspace import RECIPES

AUTO = "auto"  # what an empty box means
DRAFT = f"{RECIPES}/.draft.yaml"  # what the plan is made of; a name that no list shows


def build(page: Page) -> None:
    say, workspace = page.say, page.workspace

    def help(field: str) -> str:
        return explain(drafts.FIELDS[field], page.language)

    gr.Markdown(f"### 1 · {say('step_recipe')}")
    with gr.Row():
        origin = gr.Dropdown(label=say("start_from"), choices=[(say("blank"), drafts.BLANK)], elem_id="origin")
        name = gr.Textbox(label=say("name"), value="my-run", elem_id="name")
        task = gr.Dropdown(label=say("task"), info=help("task"), choices=list(get_args(Task)), value="causal_lm")
    gr.Markdown(f"### 2 · {say('step_model')}")
    with gr.Row():
        model = gr.Dropdown(
            label=say("model"), info=help("model"), choices=[], allow_custom_value=True, elem_id="model", scale=2
        )
        bits = gr.Dropdown(label=say("bits"), info=help("bits"), choices=[("-", ""), ("8", 8), ("4", 4)], value="")
    gr.Markdown(f"### 3 · {say('step_data')}")
    with gr.Row():
        data = gr.Dropdown(label=say("data_file"), choices=[], elem_id="data")
        prompt = gr.Textbox(label=say("prompt"), info=help("prompt"), elem_id="prompt")
        system = gr.Textbox(label=say("system"), info=help("system"))
        max_length = gr.Number(label="max_length", info=help("max_length"), precision=0, value=512)
    gr.Markdown(f"### 4 · {say('step_method')}")
    with gr.Row():
        methods = ["lora", "full", *sorted(method.lower() for method in NOTES if method != "LORA")]
        method = gr.Dropdown(label=say("method"), choices=methods, value="lora", allow_custom_value=True)
        r = gr.Textbox(label="r", info=help("r"), placeholder=AUTO)
        alpha = gr.Textbox(label="alpha", info=help("alpha"), placeholder=AUTO)
    with gr.Row():
        epochs = gr.Number(label="epochs", info=help("epochs"), value=3, min_width=120)
        steps = gr.Textbox(label="steps", info=help("steps"), placeholder=AUTO, min_width=120, elem_id="steps")
        lr = gr.Number(label="lr", info=help("lr"), value=2e-4, step=1e-5, min_width=120, elem_id="lr")
        batch = gr.Number(label="batch", info=help("batch"), precision=0, value=8, min_width=120, elem_id="batch")
    more = gr.Textbox(label=say("more"), placeholder="train.schedule=linear", lines=2, elem_id="more")
    problem = gr.HTML(elem_id="problem")
    gr.Markdown(f"### 5 · {say('step_check')}")
    command = gr.Code(label=say("command"), language="shell", interactive=False, lines=1, elem_id="command")
    yaml = gr.Code(label=say("recipe"), language="yaml", interactive=False, max_lines=24, elem_id="yaml")
    with gr.Row():
        weigh = gr.Button(say("plan"), visible=there_is("plan"), elem_id="plan")
        go = gr.Button(say("start_training"), variant="primary", elem_id="start")
    planned = gr.HTML("" if there_is("plan") else f"<p>{escape(say('absent', command='peft plan'))}</p>")
    started = gr.HTML(elem_id="started")
    job_panel(page, "train")
    boxes = {
        "task": task,
        "model": model,
        "bits": bits,
        "data": data,
        "prompt": prompt,
        "system": system,
        "max_length": max_length,
        "method": method,
        "r": r,
        "alpha": alpha,
        "epochs": epochs,
        "steps": steps,
        "lr": lr,
        "batch": batch,
    }
    inputs = [origin, name, more, *boxes.values()]

    def recipe_of(origin: str, name: str, more: str, *values: Any) -> Recipe:
        given = dict(zip(boxes, values))
        return drafts.make(workspace, drafts.start(workspace, origin), name, given, more)

    def opened(request: gr.Request) -> tuple[Any, ...]:
        asked = request.query_params.get("data")
        files = workspace.data_files()
        file = asked if asked in files else next(iter(files), None)
        models = [*workspace.models(), PACKAGED]
        origins = [(say("blank"), drafts.BLANK), *drafts.choices(workspace, page.language)]
        noted = workspace.mapping(file) if file else {}
        return (
            gr.Dropdown(choices=origins, value=drafts.BLANK),
            gr.Dropdown(choices=models, value=models[0]),
            gr.Dropdown(choices=files, value=file),
            noted.get("task", "causal_lm"),
            noted.get("prompt", ""),
        )

    def taken(origin: str) -> tuple[Any, ...]:
        """A recipe that was chosen fills the boxes in."""
        file = drafts.start(workspace, origin)
        if file is None:
            return tuple(gr.skip() for _ in (name, *boxes))
        recipe = load(file)
        values = drafts.values_of(recipe, workspace)
        files = list(dict.fromkeys([*workspace.data_files(), *([values["data"]] if values["data"] else [])]))
        values["data"] = gr.Dropdown(choices=files, value=values["data"])
        values["bits"] = values["bits"] or ""
        return recipe.output.name or file.stem, *(values[field] for field in boxes)

    def previewed(*values: Any) -> tuple[str, str, str]:
        try:
            recipe = recipe_of(*values)
        except RunError as error:
            return "", "", wrong(error.tell(page.language))
        place = workspace.name(drafts.place_for(workspace, recipe))
        return drafts.yaml_of(recipe, workspace), f"peft train {place}", ""

    def weighed(*values: Any) -> str:
        write_text(workspace.root / DRAFT, drafts.yaml_of(recipe_of(*values), workspace))
        return plan.shown(page, ask(page.jobs, "plan", DRAFT, language=page.language))

    def begun(*values: Any) -> tuple[str, Any]:
        recipe = recipe_of(*values)
        place = workspace.name(drafts.save(workspace, recipe))
        page.jobs.start("train", "train", place, language=page.language)
        link = page.link("runs", say("page_runs"))
        return f"<p>{escape(say('started', path=place))} {link}</p>", gr.skip()

    page.blocks.load(opened, outputs=[origin, model, data, task, prompt], **quiet()).then(
        previewed, inputs=inputs, outputs=[yaml, command, problem], **quiet()
    )
    origin.input(page.told(taken), inputs=origin, outputs=[name, *boxes.values()], **quiet())
    gr.on(
        [box.change for box in inputs],
        previewed,
        inputs=inputs,
        outputs=[yaml, command, problem],
        trigger_mode="always_last",
        **quiet(),
    )
    weigh.click(page.told(weighed), inputs=inputs, outputs=planned, api_visibility="private")
    go.click(page.told(begun), inputs=inputs, outputs=[started, problem], api_visibility="private")
