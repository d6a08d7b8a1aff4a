"""What rows of a file mean: formats, how they are recognised by their columns, and the samples made of them.

A format makes samples of one kind; a sample is a dict:

    chat        messages: [{role, content, train?}]
    text        text
    label       text, pair (or None), label
    tags        tokens: [str], tags: [str]
    span        question, context, answer, start
    pair        source, target
    preference  messages (the prompt), chosen, rejected
    rated       messages (the prompt), completion, good: bool
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
Sample = dict[str, Any]

TEXT = ("text", "sentence", "review", "content", "comment", "sentence1", "文本", "评论", "内容", "正文", "句子", "评价")
LABEL = ("label", "labels", "sentiment", "category", "class", "标签", "情感", "类别", "分类", "情感倾向")
PROMPT = ("prompt", "query", "question", "problem", "提示", "问题", "提问", "问")
ANSWER = ("completion", "response", "answer", "reply", "回答", "答案", "回复", "答")
SYSTEM = ("system", "system_prompt", "系统")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant"}
GOOD = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}


class BadRow(ValueError):
    """A row that the format cannot use; the text is a key of `peft_run.messages.data`."""

    def __init__(self, key: str, **values: Any) -> None:
        super().__init__(key)
        self.key, self.values = key, values


class Format(NamedTuple):
    name: str
    kind: str
    required: dict[str, Sequence[str]]  # field -> names that columns may have
    optional: dict[str, Sequence[str]]
    sample: Callable[[Row], Sample]  # from fields to a sample; raises BadRow
    fits: Callable[[Row], bool] = lambda fields: True  # a look at one row's values


def text(fields: Row, name: str) -> str:
    """A field as text. Raises BadRow where there is none."""
    value = plain(fields.get(name))
    if not value.strip():
        raise BadRow("data.field_empty", field=name)
    return value


def plain(value: Any) -> str:
    """Text of a cell: spreadsheets store 1 as 1.0, and an empty cell as NaN."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def unpacked(value: Any) -> Any:
    """A list or an object that a csv cell holds as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def turns(value: Any) -> list[dict[str, Any]]:
    """Messages, whatever they call their parts."""
    value = unpacked(value)
    if not isinstance(value, list) or not value:
        raise BadRow("data.no_messages")
    found = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRow("data.no_messages")
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            raise BadRow("data.bad_message", turn=str(turn)[:80])
        message: dict[str, Any] = {"role": role, "content": content}
        if (flag := turn.get("train", turn.get("loss"))) is not None:
            message["train"] = bool(flag)
        found.append(message)
    return found


def has_turns(fields: Row, name: str) -> bool:
    value = unpacked(next(iter(fields.values())))
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and name in value[0]


def chat(fields: Row, prompt: str, answer: str) -> Sample:
    messages = [{"role": "system", "content": plain(fields["system"])}] if plain(fields.get("system")).strip() else []
    history = unpacked(fields.get("history")) or []
    if not isinstance(history, list):
        raise BadRow("data.bad_history")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("data.bad_history")
        messages += [{"role": "user", "content": plain(turn[0])}, {"role": "assistant", "content": plain(turn[1])}]
    return {"messages": [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def messages_sample(fields: Row) -> Sample:
    messages = turns(fields["messages"])
    if plain(fields.get("system")).strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": plain(fields["system"])})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("data.no_answer")
    return {"messages": messages}


def alpaca_sample(fields: Row) -> Sample:
    more = plain(fields.get("input"))
    prompt = text(fields, "instruction") + (f"\n{more}" if more.strip() else "")
    return chat(fields, prompt, text(fields, "output"))


def label_sample(fields: Row) -> Sample:
    return {
        "text": text(fields, "text"),
        "pair": plain(fields.get("pair")) or None,
        "label": text(fields, "label").strip(),
    }


def tags_sample(fields: Row) -> Sample:
    tokens, tags = (words(fields[name]) for name in ("tokens", "tags"))
    if not tokens:
        raise BadRow("data.field_empty", field="tokens")
    if len(tokens) != len(tags):
        raise BadRow("data.tags_differ", tokens=len(tokens), tags=len(tags))
    return {"tokens": tokens, "tags": tags}


def words(value: Any) -> list[str]:
    value = unpacked(value)
    return plain(value).split() if not isinstance(value, list) else [plain(part) for part in value]


def span_sample(fields: Row) -> Sample:
    """The first answer; where no place is given, the first place it is found at."""
    context, answers = text(fields, "context"), unpacked(fields["answers"])
    start = fields.get("start")
    if isinstance(answers, dict):
        answers, start = answers.get("text"), answers.get("answer_start", start)
    elif isinstance(answers, list) and answers and isinstance(answers[0], dict):
        answers, start = answers[0].get("text"), answers[0].get("answer_start", start)
    answer = plain(
        answers[0] if isinstance(answers, list) and answers else answers if not isinstance(answers, list) else ""
    )
    start = start[0] if isinstance(start, list) and start else start
    if not answer:
        raise BadRow("data.field_empty", field="answers")
    start = int(start) if plain(start).strip().isdigit() else context.find(answer)
    if start < 0 or context[start : start + len(answer)] != answer:
        raise BadRow("data.answer_not_there", answer=answer[:40])
    return {"question": text(fields, "question"), "context": context, "answer": answer, "start": start}


def pair_sample(fields: Row) -> Sample:
    return {"source": text(fields, "source"), "target": text(fields, "target")}


def preference_sample(fields: Row) -> Sample:
    chosen, rejected = unpacked(fields["chosen"]), unpacked(fields["rejected"])
    if isinstance(chosen, list) and isinstance(rejected, list):  # whole chats, which begin alike
        chosen, rejected = turns(chosen), turns(rejected)
        prompt, answers = chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])
        prompt = prompt or turns(fields.get("prompt"))
    else:
        prompt, answers = prompt_of(fields), (text(fields, "chosen"), text(fields, "rejected"))
    if answers[0] == answers[1]:
        raise BadRow("data.same_answers")
    return {"messages": prompt, "chosen": answers[0], "rejected": answers[1]}


def rated_sample(fields: Row) -> Sample:
    good = GOOD.get(plain(fields["good"]).strip().lower())
    if good is None:
        raise BadRow("data.not_a_rating", value=plain(fields["good"])[:40])
    return {"messages": prompt_of(fields), "completion": text(fields, "completion"), "good": good}


def prompt_of(fields: Row) -> list[dict[str, Any]]:
    value = unpacked(fields.get("prompt"))
    if isinstance(value, list):
        return turns(value)
    system = [{"role": "system", "content": plain(fields["system"])}] if plain(fields.get("system")).strip() else []
    return [*system, {"role": "user", "content": text(fields, "prompt")}]


# In the order in which they are tried: what asks for more, or for what is rarer, first.
FORMATS = {
    f.name: f
    for f in (
        Format(
            "preference",
            "preference",
            {
                "chosen": ("chosen", "preferred", "更好", "优选"),
                "rejected": ("rejected", "dispreferred", "更差", "拒绝"),
            },
            {"prompt": (*PROMPT, "instruction", "指令"), "system": SYSTEM},
            preference_sample,
        ),
        Format(
            "rated",
            "rated",
            {"prompt": PROMPT, "completion": ANSWER, "good": ("good", "kto_tag", "label", "标签", "好坏")},
            {"system": SYSTEM},
            rated_sample,
            lambda fields: plain(fields["good"]).strip().lower() in GOOD,
        ),
        Format(
            "messages",
            "chat",
            {"messages": ("messages", "conversation", "dialog", "dialogue", "conversations", "对话")},
            {"system": SYSTEM},
            messages_sample,
            lambda fields: has_turns(fields, "role"),
        ),
        Format(
            "sharegpt",
            "chat",
            {"messages": ("conversations", "conversation", "messages", "对话")},
            {"system": SYSTEM},
            messages_sample,
            lambda fields: has_turns(fields, "from"),
        ),
        Format(
            "extractive_qa",
            "span",
            {
                "question": ("question", "query", "问题", "提问"),
                "context": ("context", "passage", "paragraph", "原文", "段落", "上下文"),
                "answers": ("answers", "answer", "答案", "回答"),
            },
            {"start": ("answer_start", "start", "位置")},
            span_sample,
        ),
        Format(
            "token_tags",
            "tags",
            {"tokens": ("tokens", "words", "词", "字"), "tags": ("ner_tags", "tags", "pos_tags", "labels", "标注")},
            {},
            tags_sample,
        ),
        Format(
            "alpaca",
            "chat",
            {"instruction": ("instruction", "指令"), "output": ("output", "response", "输出", "回答", "答案")},
            {"input": ("input", "输入"), "system": SYSTEM, "history": ("history", "历史")},
            alpaca_sample,
        ),
        Format(
            "prompt_completion",
            "chat",
            {"prompt": PROMPT, "completion": ANSWER},
            {"system": SYSTEM, "history": ("history", "历史")},
            lambda fields: chat(fields, text(fields, "prompt"), text(fields, "completion")),
        ),
        Format(
            "seq2seq",
            "pair",
            {
                "source": (
                    "source",
                    "document",
                    "article",
                    "src",
                    "body",
                    "正文",
                    "原文",
                    "内容",
                    "content",
                    "text",
                    "文本",
                ),
                "target": (
                    "target",
                    "summary",
                    "title",
                    "highlights",
                    "tgt",
                    "headline",
                    "摘要",
                    "标题",
                    "概要",
                    "译文",
                ),
            },
            {},
            pair_sample,
        ),
        Format(
            "classification",
            "label",
            {"text": TEXT, "label": LABEL},
            {"pair": ("sentence2", "text2", "text_pair", "hypothesis", "句子2")},
            label_sample,
        ),
        Format("text", "text", {"text": TEXT}, {}, lambda fields: {"text": text(fields, "text")}),
    )
}
