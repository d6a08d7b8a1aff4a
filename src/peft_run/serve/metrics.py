"""Counters and sums, as text that Prometheus reads."""

from __future__ import annotations

import threading
from collections import defaultdict

PREFIX = "peft_"


class Metrics:
    def __init__(self) -> None:
        self.values: dict[str, float] = defaultdict(float)
        self.lock = threading.Lock()

    def count(self, name: str, more: float = 1, **labels: object) -> None:
        with self.lock:
            self.values[key(f"{name}_total", labels)] += more

    def observe(self, name: str, value: float) -> None:
        """A duration or size, kept as its sum and count."""
        with self.lock:
            self.values[f"{name}_sum"] += value
            self.values[f"{name}_count"] += 1

    def text(self, **gauges: float) -> str:
        """All of it. gauges: what is read at this moment."""
        with self.lock:
            values = {**self.values, **gauges}
        lines, typed = [], set()
        for name, value in sorted(values.items()):
            plain = name.partition("{")[0]
            if plain not in typed:
                typed.add(plain)
                kind = "counter" if plain.endswith(("_total", "_sum", "_count")) else "gauge"
                lines.append(f"# TYPE {PREFIX}{plain} {kind}")
            lines.append(f"{PREFIX}{name} {value:.10g}")
        return "\n".join(lines) + "\n"


def key(name: str, labels: dict[str, object]) -> str:
    return name + ("{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else "")
