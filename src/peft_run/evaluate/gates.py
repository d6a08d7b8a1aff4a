"""`--fail-under accuracy=0.8`: a measure that is worse than its limit fails the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_run.errors import QualityError, UsageError
from peft_run.evaluate.results import FORGETTING
from peft_run.metrics.table import METRICS


def parse(texts: Sequence[str]) -> dict[str, float]:
    limits = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError
            limits[name.strip()] = float(value)
        except ValueError:
            raise UsageError("evaluate.bad_limit", given=text) from None
    return limits


def check(result: dict[str, Any], limits: dict[str, float]) -> None:
    """Raises QualityError for the first measure that is worse than its limit; NaN is."""
    for name, limit in limits.items():
        value, higher = measured(result, name)
        good = value is not None and (value >= limit if higher else value <= limit)
        if not good:
            shown = "-" if value is None else f"{value:.4f}"
            raise QualityError("evaluate.too_bad", name=name, value=shown, limit=limit, sign="<" if higher else ">")


def measured(result: dict[str, Any], name: str) -> tuple[float | None, bool]:
    """The tuned model's value, and whether higher is better."""
    if name == FORGETTING:
        ratios = [text["ratio"] for text in result["forgetting"].values() if "ratio" in text]
        return max(ratios, default=None), False
    return result["metrics"].get(name, {}).get("tuned"), METRICS[name].higher_is_better
