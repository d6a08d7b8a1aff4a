"""Samples of one kind as samples of the kind that a task learns from."""

from __future__ import annotations

from typing import Any

from peft_run.data.formats import BadRow, Sample
from peft_run.errors import UsageError

NEEDS = {
    "causal_lm": ("chat", "text"),
    "seq_cls": ("label",),
    "token_cls": ("tags",),
    "qa": ("span",),
    "seq2seq": ("pair",),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("rated",),
}


def adapt(sample: Sample, kind: str, task: str, data: Any) -> list[Sample]:
    """The sample as the task needs it: usually one, two where a preference becomes two ratings."""
    if kind == "preference" and task == "kto":
        rated = (("chosen", True), ("rejected", False))
        return [{"messages": sample["messages"], "completion": sample[name], "good": good} for name, good in rated]
    if kind not in NEEDS[task]:
        prompt, answer = question_and_answer(sample, kind, data)
        if task == "seq2seq":
            return [{"source": prompt, "target": answer}]
        sample = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        kind = "chat"
    if data.system and "messages" in sample and sample["messages"][0]["role"] != "system":
        sample = {**sample, "messages": [{"role": "system", "content": data.system}, *sample["messages"]]}
    return [sample]


def question_and_answer(sample: Sample, kind: str, data: Any) -> tuple[str, str]:
    """What a person would ask, and the answer that is learnt."""
    if kind == "label":
        return fill(data.prompt or "{text}", sample), sample["label"]
    if kind == "span":
        return fill(data.prompt or "{context}\n{question}", sample), sample["answer"]
    if kind == "pair":
        return fill(data.prompt or "{source}", sample), sample["target"]
    asked = [message["content"] for message in sample["messages"] if message["role"] == "user"]
    if len(asked) != 1 or sample["messages"][-1]["role"] != "assistant":
        raise BadRow("data.many_turns")
    return asked[0], sample["messages"][-1]["content"]


def fill(template: str, sample: Sample) -> str:
    """`{text}` and the like, and nothing else that str.format could reach."""
    fields = {name: value for name, value in sample.items() if isinstance(value, str)}
    try:
        return template.format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UsageError("data.bad_prompt", prompt=template, fields=", ".join(fields), problem=error) from error
