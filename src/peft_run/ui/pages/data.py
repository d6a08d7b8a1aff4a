"""Data: upload a file, see what it is taken for, say otherwise, and look at what would be learnt, token by token."""

from __future__ import annotations

import shutil
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from peft_run.config.schema import Task
from peft_run.data.detect import detect, likely_task
from peft_run.data.formats import FORMATS
from peft_run.data.read import READERS, read
from peft_run.errors import RunError
from peft_run.ui.command import Answer, ask
from peft_run.ui.layout import Page, quiet, table, wrong
from peft_run.ui.workspace import DATA

AUTO = "auto"
FIELDS = 6  # the most that a format has
ROWS = 5  # shown as they stand in the file
CELL = 200  # characters of a cell
SAMPLES = 4


def build(page: Page) -> None:
    say, workspace = page.say, page.workspace
    gr.Markdown(say("data_about"))
    with gr.Row():
        with gr.Column():
            sent = gr.File(label=say("upload"), file_types=sorted(READERS), height=120, elem_id="upload")
        with gr.Column():
            file = gr.Dropdown(label=say("data_file"), choices=[], elem_id="file")
            model = gr.Dropdown(label=say("tokenizer_of"), choices=[], allow_custom_value=True, elem_id="model")
    rows = gr.HTML(elem_id="rows")
    with gr.Row():
        task = gr.Dropdown(label=say("task"), choices=[AUTO, *get_args(Task)], value=AUTO, elem_id="task")
        format = gr.Dropdown(label=say("format"), choices=[AUTO, *FORMATS], value=AUTO)
        prompt = gr.Textbox(label=say("prompt"), placeholder=say("prompt_example"), elem_id="prompt")
    found = gr.HTML(elem_id="found")
    with gr.Row():
        columns = [gr.Dropdown(choices=[], visible=False, min_width=140) for _ in range(FIELDS)]
    with gr.Row():
        show = gr.Button(say("show_samples"), variant="primary", elem_id="show")
        keep = gr.Button(say("keep_mapping"), elem_id="keep")
    result = gr.HTML(elem_id="preview")
    fields = gr.State([])  # what the boxes stand for, in their order
    settings = [file, task, format, prompt, fields, *columns]

    def opened(request: gr.Request) -> tuple[Any, Any]:
        names = workspace.data_files()
        asked = request.query_params.get("file")
        value = asked if asked in names else next(iter(names), None)
        models = workspace.models()
        return gr.Dropdown(choices=names, value=value), gr.Dropdown(choices=models, value=next(iter(models), None))

    def received(temporary: str | None) -> Any:
        if temporary is None:
            return gr.skip()
        place = workspace.new(DATA, Path(temporary).name)
        if place.suffix.lower() not in READERS:
            raise RunError("ui.no_data_file", name=place.name, known=", ".join(READERS))
        shutil.copyfile(temporary, place)
        name = workspace.name(place)
        return gr.Dropdown(choices=workspace.data_files(), value=name)

    def chosen(name: str | None) -> tuple[Any, ...]:
        if not name:
            return "", AUTO, AUTO, ""
        noted = workspace.mapping(name)
        try:
            text = first_rows(page, read(workspace.inside(name)))
        except RunError as error:
            text = wrong(error.tell(page.language))
        return text, noted.get("task", AUTO), noted.get("format", AUTO), noted.get("prompt", "")

    def detected(name: str | None, task: str, format: str) -> tuple[Any, ...]:
        """What the file is taken for, and a box for each field of its format."""
        boxes = [gr.Dropdown(visible=False, value=None) for _ in range(FIELDS)]
        if not name:
            return "", [], *boxes
        noted = workspace.mapping(name)
        mapping = dict(noted.get("map", {})) if noted.get("format", AUTO) == format else {}
        try:
            table_rows = read(workspace.inside(name))
            usual = task if task != AUTO else likely_task(table_rows, mapping)
            known = list(dict.fromkeys(column for row in table_rows[:ROWS] for column in row))
            try:
                seen = detect(table_rows, usual, format=format, mapping=mapping, path=name)
                text = say("taken_for", format=seen.format.name, task=usual)
                shape, mapping = seen.format, seen.mapping
                message = f"<p>{escape(text)}</p>"
            except RunError as error:
                message = wrong(error.tell(page.language))
                shape = FORMATS.get(format)
        except RunError as error:
            return wrong(error.tell(page.language)), [], *boxes
        names = [*shape.required, *shape.optional][:FIELDS] if shape else []
        for i, field in enumerate(names):
            boxes[i] = gr.Dropdown(label=f"{field} ←", choices=["", *known], value=mapping.get(field, ""), visible=True)
        return message, names, *boxes

    def preview(name: str | None, task: str, format: str, prompt: str, names: list[str], *rest: Any) -> str:
        *picked, model = rest
        if not name:
            return wrong(say("no_file"))
        workspace.inside(name)
        words = ["data", name, "--samples", str(SAMPLES)]
        words += [] if task == AUTO else ["--task", task]
        if model:
            workspace.check_model(model)
            words += ["--model", model]
        changes = overrides(names, format, prompt, picked)
        return shown(page, ask(page.jobs, *words, *changes, language=page.language), bool(model))

    def kept(name: str | None, task: str, format: str, prompt: str, names: list[str], *picked: Any) -> None:
        if not name:
            raise RunError("ui.no_file")
        mapping = {field: column for field, column in zip(names, picked) if column}
        if task == AUTO:
            task = likely_task(read(workspace.inside(name)), mapping)
        workspace.note_mapping(name, {"task": task, "format": format, "prompt": prompt, "map": mapping})
        gr.Info(say("mapping_kept"))

    page.blocks.load(opened, outputs=[file, model], **quiet())
    sent.upload(page.told(received), inputs=sent, outputs=file, api_visibility="private")
    file.change(page.told(chosen), inputs=file, outputs=[rows, task, format, prompt], **quiet()).then(
        page.told(detected), inputs=[file, task, format], outputs=[found, fields, *columns], **quiet()
    )
    gr.on(
        [task.input, format.input],
        page.told(detected),
        inputs=[file, task, format],
        outputs=[found, fields, *columns],
        **quiet(),
    )
    show.click(page.told(preview), inputs=[*settings, model], outputs=result, api_visibility="private")
    keep.click(page.told(kept), inputs=settings, **quiet())


def overrides(fields: list[str], format: str, prompt: str, picked: list[Any]) -> list[str]:
    """The page's choices as changes to a recipe."""
    found = [f"data.train.map.{field}={quoted(column)}" for field, column in zip(fields, picked) if column]
    if format != AUTO:
        found.append(f"data.train.format={format}")
    if prompt:
        found.append(f"data.prompt={quoted(prompt)}")
    return found


def quoted(text: str) -> str:
    """Text as YAML that is nothing but text."""
    import json

    return json.dumps(text, ensure_ascii=False)


def first_rows(page: Page, rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows[:ROWS] for column in row))
    cells = [[str(row.get(column, ""))[:CELL] for column in columns] for row in rows[:ROWS]]
    return f"<p>{escape(page.say('rows', count=len(rows)))}</p>" + table(columns, cells)


def shown(page: Page, answer: Answer, with_model: bool) -> str:
    """Samples with the learnt tokens marked, and the statistics."""
    parts = [wrong(answer.told)] if answer.code else []
    result = answer.result
    if result is None:
        return "".join(parts)
    if result.get("preview"):
        parts.append(f"<h3>{escape(page.say('samples'))}</h3><p>{escape(page.say('learnt_is_marked'))}</p>")
    for pieces in result.get("preview", []):
        text = "".join(f"<mark>{escape(t)}</mark>" if learnt else escape(t) for t, learnt in pieces)
        parts.append(f'<div class="peft-sample">{text}</div>')
    if not with_model:
        parts.append(f"<p>{escape(page.say('no_tokenizer'))}</p>")
    parts.append(f"<h3>{escape(page.say('statistics'))}</h3>")
    rows = [[page.say("samples"), str(result["samples"]["train"])]]
    for unit in ("characters", "tokens"):
        for part, values in result[unit].items():
            spread = "  ".join(f"{name} {value}" for name, value in values["quantiles"].items())
            rows.append([f"{page.say(unit)} ({part})", spread])
    rows.append([page.say("duplicates"), str(result["duplicates"])])
    for counts in result["labels"].values():
        rows.append([page.say("labels"), "\n".join(f"{label}: {count}" for label, count in counts.items())])
    return "".join(parts) + table(["", ""], rows)
