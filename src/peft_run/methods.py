"""`peft methods`: the table of methods, from the registry; what was measured comes from `methods.json`.

`python -m peft_run.methods` prints it as docs/methods.md. `benchmarks/summarise_methods.py` writes that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib.resources import files
from typing import NamedTuple

from peft_run.errors import UsageError
from peft_run.method_notes import NOTES

HEAD = """# Methods

{count} methods; the names are values of `peft_type`. `peft methods` prints this table, `peft methods LORA` one row.

- **numbers**: trained numbers for one linear layer of 1536 x 576, in the benchmark's setting, shared ones included.
- **merges**: the adapter can be put into the weight, so that it costs nothing afterwards.
- **mixed**: several adapters may share a batch, each row with its own.
- **time**, **memory**: a training step in multiples of the frozen model's forward and backward, and peak memory beside
  it, in MiB, on the model of the benchmark (4 layers, 1 x 256 tokens, float32, CPU): `benchmarks/methods.py`. Below
  1, as on this AMD processor [frozen layers are multiplied faster](performance.md) than torch does.

All of them train on [quantized bases](quantization.md), and those that merge can be merged there. What each learns in
60 steps is in [learning.md](../benchmarks/results/learning.md), time and memory against Hugging Face PEFT in
[methods.md](../benchmarks/results/methods.md).

"""


class Row(NamedTuple):
    name: str
    trains: str
    numbers: str
    layers: str
    merges: str
    mixed: str
    time: str
    memory: str
    use: str
    paper: str


def rows() -> list[Row]:
    """One row a method, by name."""
    import inspect

    from peft import registry
    from peft.core.adapter import Adapter

    measured = json.loads(files("peft_run").joinpath("methods.json").read_text())
    found = []
    for name in sorted(registry.names()):
        method = registry.method(name)
        layer_cls = getattr(method.tuner, "layer_cls", None)
        adapter = getattr(layer_cls, "adapter_cls", None)
        text = inspect.getdoc(sys.modules[(method.tuner or method.encoder).__module__]) or ""
        paper = re.search(r"arXiv (\d{4}\.\d{5})", text + (inspect.getsource(method.config)))
        figures = measured.get(name, {})
        trains, use = NOTES.get(name, ("", ""))
        swaps = adapter is not None and "module" in adapter.kinds
        merges = swaps or (adapter is not None and adapter.merged_weight is not Adapter.merged_weight)
        found.append(
            Row(
                name,
                trains,
                f"{figures['numbers']:,}" if "numbers" in figures else "",
                ", ".join(adapter.kinds) if adapter is not None else "the model" if method.tuner else "the input",
                "yes" if merges else "no",
                "yes" if adapter is not None and adapter.by_row else "no",
                f"{figures['time']:.2f}" if "time" in figures else "",
                f"{figures['memory']:.0f}" if "memory" in figures else "",
                use,
                f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "",
            )
        )
    return found


def markdown() -> str:
    """docs/methods.md."""
    table = rows()
    lines = [f"| {' | '.join(Row._fields)} |", "|---|---|--:|---|---|---|--:|--:|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in table]
    return HEAD.format(count=len(table)) + "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="METHOD", help="show these in full; without names: the table")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    table = {row.name: row for row in rows()}
    names = [name.upper() for name in options.names]
    if unknown := [name for name in names if name not in table]:
        raise UsageError(f"there is no method {unknown[0]}; `peft methods` lists them all.")
    if options.json:
        print(json.dumps([row._asdict() for name, row in table.items() if not names or name in names], indent=2))
    elif names:
        for name in names:
            print("\n".join(f"{key:8} {value}" for key, value in table[name]._asdict().items() if value))
    else:
        shown = ("name", "numbers", "merges", "mixed", "time", "use")
        cells = [shown, *(tuple(getattr(row, key) for key in shown) for row in table.values())]
        widths = [max(len(row[i]) for row in cells) for i in range(len(shown))]
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


if __name__ == "__main__":
    print(markdown(), end="")
