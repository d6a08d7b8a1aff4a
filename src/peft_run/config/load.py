"""From a recipe file and `section.key=value` overrides to a Recipe, and back to a file.

A relative path in a file starts from that file's folder, one in an override from the current folder. Order: defaults,
then the file, then the overrides from left to right.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from peft_run.config.aliases import ALIASES, IN_SECTION, VALUES
from peft_run.config.schema import Recipe
from peft_run.errors import UsageError

MAX_BYTES = 1 << 20
PATHS = (
    "model.path",
    "model.tokenizer",
    "data.train",
    "data.eval",
    "data.test",
    "data.template",
    "eval.forgetting",
    "output.dir",
)


def load(file: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file. Without a file: defaults and overrides. Raises UsageError naming what is wrong."""
    raw = translate(read(Path(file))) if file is not None else {}
    base = Path(file).resolve().parent if file is not None else Path.cwd()
    for override in overrides:
        put(raw, *parse_override(override, base))
    return validate(raw, base, file or "recipe")


def build(raw: dict[str, Any], base: Path | None = None) -> Recipe:
    """A Recipe from nested dicts; relative paths start from `base`, or from the current folder."""
    return validate(translate(raw), base or Path.cwd(), "recipe")


def validate(raw: dict[str, Any], base: Path, file: Any) -> Recipe:
    try:
        recipe = Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        raise UsageError("config.invalid", file=file, problem=first_problem(error, nearest)) from error
    recipe._base = base
    return recipe


class Loader(yaml.SafeLoader):
    """YAML without aliases, which can blow up a small file, and without repeated keys, of which one would be lost."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (`*name`) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"`{key}` stands there twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError("config.no_file", file=file)
    if file.stat().st_size > MAX_BYTES:
        raise UsageError("config.too_large", file=file, limit=MAX_BYTES)
    try:
        raw = yaml.load(file.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise UsageError("config.no_yaml", file=file, problem=" ".join(str(error).split())) from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UsageError("config.no_mapping", file=file, found=type(raw).__name__)
    return raw


def parse_override(text: str, base: Path) -> tuple[list[str], Any]:
    """`train.lr=1e-4` -> (["train", "lr"], "1e-4"); values are YAML, so `[a, b]`, `true` and `null` work."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError("config.no_override", text=text)
    name = name.strip().lstrip("-").replace("-", "_")
    try:
        parsed = yaml.load(value, Loader) if value.strip() else ""
    except yaml.YAMLError as error:
        raise UsageError("config.no_yaml", file=text, problem=" ".join(str(error).split())) from error
    keys, parsed = canonical(name.split("."), parsed)
    field = ".".join(keys)
    if field in PATHS or (field.startswith("data.") and field.endswith(".path")):
        parsed = [from_here(p, base) for p in parsed] if isinstance(parsed, list) else from_here(parsed, base)
    return keys, parsed


def canonical(keys: list[str], value: Any) -> tuple[list[str], Any]:
    """Our name and value for a name and value that may come from another tool."""
    if len(keys) == 1 and keys[0] in ALIASES and keys[0] not in Recipe.model_fields:
        simple = value if isinstance(value, str | int | bool | None) else None
        return ALIASES[keys[0]].split("."), VALUES.get(keys[0], {}).get(simple, value)
    if len(keys) > 1 and keys[1] in IN_SECTION.get(keys[0], {}):
        return [keys[0], IN_SECTION[keys[0]][keys[1]], *keys[2:]], value
    return keys, value


def from_here(path: Any, base: Path) -> Any:
    """A path typed in a shell, as one that starts from the recipe's folder. What is not there may be a hub id."""
    if not isinstance(path, str) or os.path.isabs(path) or base == Path.cwd():
        return path
    here = Path(path).expanduser()
    if not (here.exists() or path.startswith((".", "~"))):
        return path
    return os.path.relpath(here.resolve(), base)


def put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    """raw[keys[0]][keys[1]]... = value; a number is a place in a list."""
    if keys == ["model", "quant", "bits"] and value is None:  # load_in_4bit: false
        return
    where: Any = raw
    for key, following in itertools.pairwise(keys):
        if isinstance(where, list):
            where = where[place(key, where, keys)]
            continue
        if not isinstance(where.get(key), dict | list):
            inner = where.get(key)
            where[key] = {"path": inner} if isinstance(inner, str) and key in ("train", "eval", "test") else {}
            if following.isdigit():
                where[key] = [where[key]]
        where = where[key]
    if isinstance(where, list):
        where[place(keys[-1], where, keys)] = value
    else:
        where[keys[-1]] = value


def place(key: str, items: list, keys: list[str]) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UsageError("config.no_place", key=".".join(keys), count=len(items))
    return int(key)


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """Put familiar names of other tools in their places."""
    result: dict[str, Any] = {}
    for name, value in raw.items():
        if name in Recipe.model_fields and isinstance(value, dict):
            result.setdefault(name, {})
            for key, inner in value.items():
                put(result, *canonical([name, str(key)], inner))
        else:
            put(result, *canonical([str(name)], value))
    return result


def first_problem(error: pydantic.ValidationError, nearest_to: Callable[[str], str | None]) -> str:
    """One line for the first thing that is wrong: an unknown name before wrong values, because it may explain them."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    name = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "list[", "dict[")))
    if problem["type"] == "extra_forbidden":
        near = nearest_to(name)
        return f"unknown key `{name}`" + (f"; did you mean `{near}`?" if near else "")
    found = "" if isinstance(problem["input"], dict | list) else f", got {problem['input']!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"`{name}`: {problem['msg'].removeprefix('Value error, ')}{found}{more}" if name else problem["msg"] + more


def nearest(name: str) -> str | None:
    known = [path for path, _ in fields()]
    last = name.rpartition(".")[2]
    if elsewhere := [path for path in known if path.rpartition(".")[2] == last]:
        return elsewhere[0]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # right field, wrong section
        ends = [*(path.rpartition(".")[2] for path in known), *ALIASES]
        if word := difflib.get_close_matches(last, ends, n=1, cutoff=0.75):
            close = [ALIASES.get(word[0]) or next(path for path in known if path.rpartition(".")[2] == word[0])]
    return close[0] if close else None


def fields(model: type[pydantic.BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic's field) of every field, sections before what is in them."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        for inner in sections_in(field.annotation):
            yield from fields(inner, f"{path}.")


def sections_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The sections that a field's type speaks of: `Quant | None`, `list[Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in sections_in(part)]


def dump(recipe: Recipe, folder: Path | None = None) -> str:
    """The recipe as YAML, complete. For a file in `folder`, relative paths are turned so that they hold from there."""
    values = recipe.model_dump(mode="json")
    if folder is not None:
        turn_paths(values, recipe, folder)
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=120)


def turn_paths(values: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """What is no path (a hub id, a template's name) is left alone; so is an absolute path, which somebody chose."""

    def turn(section: dict[str, Any], key: str, must_exist: bool = True) -> None:
        path = section[key]
        if path and not os.path.isabs(path) and (not must_exist or recipe.at(path).exists()):
            section[key] = Path(os.path.relpath(recipe.at(path), folder)).as_posix()

    for section, key in (("model", "path"), ("model", "tokenizer"), ("data", "template"), ("eval", "forgetting")):
        turn(values[section], key)
    for source in [*values["data"]["train"], values["data"]["eval"], *values["data"]["test"]]:
        turn(source, "path")
    turn(values["output"], "dir", must_exist=False)
