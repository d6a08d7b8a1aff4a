"""Evaluate and compare: judge runs, put them side by side, and vote between two without knowing which is which."""

from __future__ import annotations

import random
from html import escape
from typing import Any

import gradio as gr

from peft_run.errors import RunError
from peft_run.ui.layout import TICK, Page, document, job_panel, quiet, table, wrong
from peft_run.ui.workspace import VOTES


def build(page: Page) -> None:
    gr.Markdown(page.say("evaluate_about"))
    with gr.Tabs():
        with gr.Tab(page.say("evaluate")):
            evaluate_tab(page)
        with gr.Tab(page.say("compare")):
            compare_tab(page)
        with gr.Tab(page.say("vote")):
            vote_tab(page)


# -- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate_tab(page: Page) -> None:
    say, workspace = page.say, page.workspace
    with gr.Row():
        run = gr.Dropdown(label=say("run"), choices=[], elem_id="run", scale=2)
        data = gr.Dropdown(label=say("test_file"), choices=[], info=say("test_file_info"))
        sample = gr.Number(label=say("rows_at_most"), precision=0, value=None, min_width=120)
    go = gr.Button(say("evaluate"), variant="primary", elem_id="evaluate")
    job_panel(page, "evaluate")
    result = gr.HTML(elem_id="result")
    seen = gr.State("")
    timer = gr.Timer(2 * TICK)

    def opened(request: gr.Request) -> tuple[Any, Any]:
        names = workspace.finished()
        asked = request.query_params.get("run")
        value = asked if asked in names else next(iter(names), None)
        files = [(say("held_out_rows"), ""), *((name, name) for name in workspace.data_files())]
        return gr.Dropdown(choices=names, value=value), gr.Dropdown(choices=files, value="")

    def begun(run: str | None, data: str, sample: float | None) -> None:
        words = ["evaluate", workspace.name(workspace.run(run or "").path)]
        words += ["--data", workspace.name(workspace.inside(data))] if data else []
        words += ["--sample", str(int(sample))] if sample else []
        page.jobs.start("evaluate", *words, language=page.language)

    def look(run: str | None, seen: str) -> tuple[Any, Any]:
        """The page of the newest evaluation; it is made again only where that has changed."""
        if not run:
            return f"<p>{escape(say('no_finished'))} {page.link('train', say('page_train'))}</p>", ""
        mark = f"{run} {stamp(page, run)}"
        return (gr.skip(), gr.skip()) if mark == seen else (evaluation(page, run), mark)

    page.blocks.load(opened, outputs=[run, data], **quiet())
    go.click(page.told(begun), inputs=[run, data, sample], **quiet())
    gr.on(
        [run.change, timer.tick, page.blocks.load],
        page.told(look),
        inputs=[run, seen],
        outputs=[result, seen],
        **quiet(),
    )


def stamp(page: Page, run: str) -> float:
    from peft_run.evaluate.report import SAMPLES

    file = page.workspace.run(run) / SAMPLES
    return file.stat().st_mtime if file.is_file() else 0.0


def evaluation(page: Page, name: str) -> str:
    from peft_run.compare.collect import Entry
    from peft_run.evaluate.report import make

    entry = Entry(page.workspace.run(name))
    if not entry.result:
        return f"<p>{escape(page.say('not_evaluated'))}</p>"
    return document(make(entry.run, entry.result, entry.rows, page.language))


# -- compare ----------------------------------------------------------------------------------------------------------


def compare_tab(page: Page) -> None:
    say, workspace = page.say, page.workspace
    runs = gr.Dropdown(label=say("runs_to_compare"), choices=[], multiselect=True, elem_id="runs")
    go = gr.Button(say("compare"), variant="primary", elem_id="compare")
    result = gr.HTML(elem_id="comparison")

    def opened() -> Any:
        names = workspace.finished()
        return gr.Dropdown(choices=names, value=names[:2])

    def compared(names: list[str]) -> str:
        from peft_run.compare import compare
        from peft_run.compare.page import page as written

        found = [workspace.run(name) for name in names or []]
        if len({run.path for run in found}) < 2:
            raise RunError("compare.two")
        return document(written(compare(found), found, page.language))

    page.blocks.load(opened, outputs=runs, **quiet())
    go.click(page.told(compared), inputs=runs, outputs=result, api_visibility="private")


# -- blind vote -------------------------------------------------------------------------------------------------------


def vote_tab(page: Page) -> None:
    say, workspace = page.say, page.workspace
    gr.Markdown(say("vote_about"))
    with gr.Row():
        first = gr.Dropdown(label=say("run"), choices=[], elem_id="first")
        second = gr.Dropdown(label=say("against"), choices=[], elem_id="second")
    question = gr.HTML(elem_id="question")
    with gr.Row(equal_height=False):
        left = gr.HTML(elem_id="left")
        right = gr.HTML(elem_id="right")
    with gr.Row():
        better_left = gr.Button(say("left_better"), interactive=False, elem_id="left_better")
        neither = gr.Button(say("neither_better"), interactive=False)
        better_right = gr.Button(say("right_better"), interactive=False, elem_id="right_better")
    result = gr.HTML(elem_id="tally")
    current = gr.State(None)  # (pair, key, order): which side is whose stays on the server
    buttons = [better_left, neither, better_right]
    outputs = [question, left, right, result, current, *buttons]

    def opened() -> tuple[Any, Any]:
        names = workspace.finished()
        others = [(say("its_base"), ""), *((name, name) for name in names)]
        return gr.Dropdown(choices=names, value=next(iter(names), None)), gr.Dropdown(choices=others, value="")

    def next_one(first: str | None, second: str) -> tuple[Any, ...]:
        off = [gr.Button(interactive=False)] * 3
        if not first or first == second:
            return "", "", "", "", None, *off
        from peft_run.compare import votes
        from peft_run.compare.collect import Entry

        pair = [first, second or f"{votes.BASE} {first}"]
        entry, other = Entry(workspace.run(first)), Entry(workspace.run(second)) if second else None
        if not entry.rows or (other is not None and not other.rows):
            return wrong(say("vote_needs_evaluation")), "", "", "", None, *off
        given = votes.read(workspace.root / VOTES, pair)
        left_over = [ballot for ballot in votes.ballots(entry, other) if ballot.key not in given]
        score = tally(page, votes.tally(given, pair), len(left_over))
        if not left_over:
            return f"<p>{escape(say('vote_done'))}</p>", "", "", score, None, *off
        ballot = random.choice(left_over)
        order = random.sample((0, 1), 2)
        shown = [answer_box(ballot.answers[i]) for i in order]
        text = table([say("question"), say("reference")], [[ballot.prompt, ballot.reference]])
        return text, *shown, score, (pair, ballot.key, order), *([gr.Button(interactive=True)] * 3)

    def voted(place: int | None) -> Any:
        def vote(first: str, second: str, current: Any) -> tuple[Any, ...]:
            from peft_run.compare import votes

            pair, key, order = current
            votes.add(workspace.root / VOTES, pair, key, votes.SAME if place is None else pair[order[place]])
            return next_one(first, second)

        return page.told(vote)

    page.blocks.load(opened, outputs=[first, second], **quiet())
    gr.on([first.change, second.change], page.told(next_one), inputs=[first, second], outputs=outputs, **quiet())
    for button, place in zip(buttons, (0, None, 1)):
        button.click(voted(place), inputs=[first, second, current], outputs=outputs, **quiet())


def answer_box(answer: str) -> str:
    return f'<div class="peft-sample">{escape(answer)}</div>'


def tally(page: Page, result: dict[str, Any], left_over: int) -> str:
    from peft_run.compare.votes import SAME

    rows = [[page.say("same") if name == SAME else name, str(count)] for name, count in result["votes"].items()]
    p = "" if result["p"] is None else f"{result['p']:.3f}"
    chance = f"<p>{escape(page.say('vote_p', p=p))}</p>" if p else ""
    return (
        table([page.say("run"), page.say("votes")], rows)
        + chance
        + f"<p>{escape(page.say('left', count=left_over))}</p>"
    )
