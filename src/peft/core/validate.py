"""Check the values of a config against the types its fields declare."""

import dataclasses
import enum
import numbers
import types
import typing

from peft.errors import ConfigError

UNIONS = (typing.Union, types.UnionType)


def check_fields(config):
    """Raise ConfigError, naming the field, where a value does not have its field's declared type."""
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), field.type
        if isinstance(hint, str):  # the file has `from __future__ import annotations`
            hint = typing.get_type_hints(type(config))[field.name]
        if not fits(value, hint):
            raise ConfigError(
                f"{type(config).__name__}.{field.name} must be {describe(hint)}, "
                f"got {value!r} of type {type(value).__name__}."
            )


def fits(value, hint):
    """Whether `value` is of the declared type; a list hint takes any list, tuple or set."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in UNIONS:
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is list or hint is list:
        return isinstance(value, (list, tuple, set, frozenset)) and all(fits(v, a) for a in args for v in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(fits, value, args))
    if origin is dict or hint is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items() if args)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and isinstance(value, str):
        return value in [member.value for member in hint]
    return isinstance(value, hint)


def describe(hint):
    """The declared type as an error message says it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "None"
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(describe(a) for a in args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(m.value for m in hint)
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of " + " to ".join(dict.fromkeys(describe(a) for a in args))
    return getattr(hint, "__name__", str(hint))


def check_range(config, field, low=None, high=None, *, above=None, integer=False):
    """Raise ConfigError unless low <= value <= high (and value > above), finite and, if asked, whole."""
    _check_number(config, field, getattr(config, field), low, high, above, integer)


def check_pattern(config, field, low=None, high=None):
    """`check_range` for each value of a pattern, {name: number} or None."""
    for key, value in (getattr(config, field) or {}).items():
        _check_number(config, f"{field}[{key!r}]", value, low, high)


def _check_number(config, field, value, low, high, above=None, integer=False):
    bad = value != value or value in (float("inf"), float("-inf"))
    bad = bad or (low is not None and value < low) or (high is not None and value > high)
    bad = bad or (above is not None and value <= above) or (integer and value != int(value))
    if bad:
        want = [f"at least {low}"] if low is not None else []
        want += [f"above {above}"] if above is not None else []
        want += [f"at most {high}"] if high is not None else []
        want = " and ".join(want) or "a finite number"
        raise ConfigError(f"{type(config).__name__}.{field} must be {want}, got {value!r}.")
