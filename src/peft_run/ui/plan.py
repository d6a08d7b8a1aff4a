"""What `peft plan --json` says, as bars: where the memory of a training goes, and what there is."""

from __future__ import annotations

from html import escape
from typing import Any

from peft_run.svg import COLOURS
from peft_run.ui.command import Answer
from peft_run.ui.layout import Page, wrong

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def shown(page: Page, answer: Answer) -> str:
    """A bar for the recipe as it is, thinner ones for the same with another method, and what would fit."""
    told = wrong(answer.told) if answer.code else ""
    if not isinstance(answer.result, dict):
        return told
    result = answer.result
    plans, own, room = result["plans"], result["method"], result["room"]
    whole = max(room or 0, *(plan["peak"] for plan in plans.values()))
    order = [own, *(name for name in plans if name != own)]
    bars = [bar(page, name, plans[name], room, whole) for name in order if name in plans]
    largest = result.get("largest", {})
    fits = page.say("largest", batch=largest.get("batch", "-"), length=largest.get("length", "-"))
    return f"{told}{key(page)}{''.join(bars)}<p>{escape(fits)}</p>"


def key(page: Page) -> str:
    parts = zip(PARTS, COLOURS)
    names = [
        f'<span><i style="background:{colour}"></i>{escape(page.say(f"part_{part}"))}</span>' for part, colour in parts
    ]
    return f'<div class="peft-key">{"".join(names)}</div>'


def bar(page: Page, name: str, plan: dict[str, Any], room: int | None, whole: int) -> str:
    """Widths are shares of `whole`, the most of all plans and of what there is. Parts need not add up to the peak."""
    total = sum(plan[part] for part in PARTS) or 1
    width = 100 * plan["peak"] / whole
    pieces = "".join(
        f'<span style="background:{colour};width:{width * plan[part] / total:.2f}%" '
        f'title="{escape(page.say(f"part_{part}"))} {mebibytes(plan[part])}"></span>'
        for part, colour in zip(PARTS, COLOURS)
    )
    fits = room is None or plan["peak"] <= room
    text = f"{mebibytes(plan['peak'])}" + (f" / {mebibytes(room)}" if room is not None else "")
    style = "good" if fits else "bad"
    return (
        f'<div class="peft-doc"><b>{escape(name)}</b> <span class="{style}">{text}</span>'
        f'<div class="peft-bar">{pieces}</div></div>'
    )


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
