"""Tables of all fields: for `config explain`, for editors (JSON Schema), and for forms."""

from __future__ import annotations

import types
import typing
from typing import Any

from peft_run.config.aliases import ALIASES, IN_SECTION
from peft_run.config.help import explain
from peft_run.config.load import fields, sections_in
from peft_run.config.schema import Recipe


def names() -> list[str]:
    return [name for name, _ in fields()]


def describe(name: str, language: str) -> dict[str, str]:
    """Name, type, default, other names and help of one field."""
    field = dict(fields())[name]
    section, _, last = name.rpartition(".")
    also = [alias for alias, own in ALIASES.items() if own == name]
    also += [f"{section}.{alias}" for alias, own in IN_SECTION.get(section, {}).items() if own == last]
    is_section = bool(sections_in(field.annotation))
    default = "" if is_section or field.is_required() else str(field.get_default(call_default_factory=True))
    return {
        "name": name,
        "type": "section" if is_section else type_text(field.annotation),
        "default": default,
        "also": ", ".join(also),
        "help": explain(name, language),
    }


def type_text(annotation: Any) -> str:
    """`Annotated[int, ...] | Literal["a"] | None` -> `int | a | None`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin in (typing.Union, types.UnionType, typing.Literal):
        return " | ".join(dict.fromkeys(part if isinstance(part, str) else type_text(part) for part in parts))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_text, parts))}]"
    return (
        "None" if annotation is type(None) else annotation.__name__ if isinstance(annotation, type) else str(annotation)
    )


def json_schema(language: str) -> dict[str, Any]:
    """JSON Schema of a recipe, each field with its help."""
    schema = Recipe.model_json_schema()
    for name, _ in fields():
        section, _, last = name.rpartition(".")
        holder = schema
        for part in section.split(".") if section else []:
            holder = resolve(holder["properties"][part], schema)
        holder["properties"][last]["description"] = explain(name, language)
    return schema


def resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The section that a property refers to, directly, as a list, or as one of several possibilities."""
    for part in (node, node.get("items", {}), *node.get("anyOf", []), *node.get("allOf", [])):
        if "$ref" in part:
            return schema["$defs"][part["$ref"].rpartition("/")[2]]
    return node
