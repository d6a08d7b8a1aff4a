"""What `peft methods` shows of measurements.

`python benchmarks/summarise_methods.py results/methods.json results/methods-second-run.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import methods
import torch
from torch import nn

TARGET = Path(__file__).parent.parent / "src" / "peft_run" / "methods.json"


class OneLayer(nn.Module):
    """A linear layer of 1536 x 576, under the names that the methods' settings target."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(576, 1536)


def numbers(method: str) -> int | None:
    """Trained numbers for one layer, or None where the setting is not about a linear layer."""
    import peft

    name, arguments, _ = methods.METHODS[method]
    if arguments.get("target_modules", "") is None or "target_modules" in arguments:
        return None
    torch.manual_seed(0)
    options = {k: v for k, v in arguments.items() if k != "feedforward_modules"}
    options |= {"feedforward_modules": []} if "feedforward_modules" in arguments else {}
    model = peft.get_peft_model(OneLayer(), getattr(peft, name)(target_modules=["up_proj"], **options))
    return model.get_nb_trainable_parameters()[0]


def main() -> None:
    found: dict[str, dict] = {}
    rows = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["rows"] if row["id"] == "P9"]
    for row in rows:  # of several runs, the later ones count
        name, _, what = row["title"].partition(" ")
        figures, metrics = found.setdefault(name, {}), row["metrics"]
        if what == "step" and metrics["of_floor"]:
            figures["time"] = round(metrics["of_floor"], 2)
        elif what == "peak memory" and metrics["ours"]:
            ours = row["samples"]["ours"]
            figures["memory"] = round((ours["adapted"][0] - ours["floor"][0]) / 2**20, 1)
    for name, figures in found.items():
        if (count := numbers(name)) is not None:
            figures["numbers"] = count
    TARGET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
