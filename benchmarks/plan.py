"""The rows of the table: what is measured, with which arguments, and what the target is."""

from __future__ import annotations

from dataclasses import dataclass, field

import methods

# How a target reads, and which metric of a row (see report.metrics) it bounds.
TARGETS = {
    "overhead_left": "overhead left ≤ {}",
    "of_floor": "≤ {}x floor",
    "of_upstream": "≤ {}x upstream",
    "speedup": "≥ {}x faster",
    "value": "≤ {}",
}


@dataclass(frozen=True)
class Row:
    id: str
    title: str
    case: str
    arguments: dict = field(default_factory=dict)
    target: tuple[str, float] | None = None
    moonshot: float | None = None  # same metric as the target
    unit: str = "s"
    fresh_process: bool = False  # every measurement in a process of its own
    deterministic: bool = False  # one round says it all
    contenders: tuple[str, ...] = ("upstream", "ours")


def step_rows() -> list[Row]:
    rows = []
    for dtype, bound in (("fp32", 0.6), ("bf16", 0.5)):
        for dropout in (0.0, 0.05):
            rows.append(
                Row(
                    "P1" if dropout == 0 else "P2",
                    f"LoRA step {dtype}, dropout {dropout:g}",
                    "step",
                    {"dtype": dtype, "dropout": dropout},
                    ("overhead_left", bound),
                    moonshot=0.25,
                )
            )
    return rows


def memory_rows() -> list[Row]:
    rows = []
    for dtype in ("fp32", "bf16"):
        for dropout in (0.0, 0.05):
            for scope, name in (("step", "step"), ("layers", "decoder layers of a step")):
                aim = ("of_upstream", 0.5) if (dtype, dropout) == ("bf16", 0.05) else None
                rows.append(
                    Row(
                        "P3",
                        f"bytes saved for backward, {name}, {dtype}, dropout {dropout:g}",
                        "saved_bytes",
                        {"dtype": dtype, "dropout": dropout, "scope": scope},
                        aim,
                        unit="B",
                        deterministic=True,
                    )
                )
    for dropout in (0.0, 0.05):
        rows.append(
            Row(
                "P4",
                f"peak resident memory of a step, bf16, dropout {dropout:g}",
                "peak_memory",
                {"dtype": "bf16", "dropout": dropout},
                unit="B",
                fresh_process=True,
                deterministic=True,
            )
        )
    return rows


def both(id: str, title: str, case: str, target: tuple[str, float] | None = None, **arguments) -> list[Row]:
    """The row in fp32 and in bf16."""
    return [Row(id, f"{title}, {dtype}", case, {"dtype": dtype, **arguments}, target) for dtype in ("fp32", "bf16")]


def method_rows() -> list[Row]:
    """Every method against upstream's, time and peak memory; prompt methods, which put tokens in front, as P20."""
    rows = []
    for name in (*methods.METHODS, *methods.PROMPTS):
        id, slowest = ("P20", 1.0) if name in methods.PROMPTS else ("P9", 1.05)
        aim = ("speedup", methods.FASTER[name]) if name in methods.FASTER else ("of_upstream", slowest)
        arguments = {"method": name}
        rows.append(Row(id, f"{name} step", "method_step", arguments, aim))
        rows.append(
            Row(
                id,
                f"{name} peak memory",
                "method_memory",
                arguments,
                unit="B",
                fresh_process=True,
                deterministic=True,
            )
        )
    return rows


def quantized_rows() -> list[Row]:
    """Steps of 1 x 512 on bitsandbytes layers, dropout 0.05; "prepared" by prepare_model_for_kbit_training first."""
    rows = []
    for dtype, prepare in (("bf16+nf4", False), ("bf16+nf4", True), ("fp32+nf4", False), ("bf16+int8", False)):
        arguments = {"dtype": dtype, "dropout": 0.05, "rows": 1, "length": 512, "prepare": prepare}
        title = f"{dtype}{', prepared' if prepare else ''}"
        rows.append(Row("P7", f"LoRA step, {title}", "step", arguments, ("speedup", 1.15)))
        rows.append(
            Row(
                "P7",
                f"peak resident memory, {title}",
                "peak_memory",
                arguments,
                ("of_upstream", 0.75),
                unit="B",
                fresh_process=True,
                deterministic=True,
            )
        )
    return rows


ROWS: list[Row] = [
    *step_rows(),
    *memory_rows(),
    *both("P5", "LoRA step 1 x 32", "step", rows=1, length=32),
    *quantized_rows(),
    *both("P8", "DoRA step", "step", ("overhead_left", 0.4), dora=True),
    *both("P8", "DoRA forward 4 x 128", "forward", rows=4, length=128, dora=True),
    *method_rows(),
    *both("P10", "unmerged prefill 1 x 1024", "forward", rows=1, length=1024),
    *both("P11", "unmerged decode, per token", "decode", ("of_floor", 1.06)),
    *both("P11", "merged decode, per token", "decode", merged=True),
    *both("P12", "8 adapters in a batch, prefill 8 x 128", "mixed_prefill", ("of_floor", 1.10), adapters=8),
    *both("P12", "8 adapters in a batch, decode, per token", "mixed_decode", ("of_floor", 1.25), adapters=8),
    Row("P13", "import after torch", "import", {"after": "torch"}, ("value", 0.15), fresh_process=True),
    Row("P13", "import after transformers", "import", {"after": "transformers"}, ("value", 0.15), fresh_process=True),
    Row("P14", "get_peft_model", "wrap", {}, ("speedup", 5.0), moonshot=15.0),
    Row("P15", "load_adapter, 2nd", "load", {"position": 2}, ("of_floor", 3.0)),
    Row("P15", "load_adapter, 16th", "load", {"position": 16}, ("of_floor", 3.0)),
    Row("P16", "set_adapter, among 17", "switch", {"adapters": 17}, ("speedup", 50.0)),
    Row("P16", "set_adapter + 1 token forward, among 17", "switch_and_forward", {"adapters": 17}),
    Row("P16", "disable_adapter enter and leave, 17 loaded", "disable", {"adapters": 17}, ("speedup", 50.0)),
    *(
        Row("P17", f"modules with {count} loaded", "module_count", {"adapters": count}, unit="", deterministic=True)
        for count in (1, 16)
    ),
    Row("P18", "save_pretrained", "save"),
    *both("P19", "merge_adapter", "merge", operation="merge"),
    *both("P19", "unmerge_adapter", "merge", operation="unmerge"),
    *both("P19", "merge_and_unload", "merge", operation="merge_and_unload"),
    *(
        Row("P19", f"base weights after merge + unmerge, largest change, {dtype}", "unmerge_error", {"dtype": dtype},
            ("value", 0.0), unit="", deterministic=True)
        for dtype in ("fp32", "bf16")
    ),
    *(
        Row("full", f"full fine-tuning step, {dtype} (no library, for orientation)", "full_step", {"dtype": dtype},
            contenders=("upstream",))
        for dtype in ("fp32", "bf16")
    ),
]  # fmt: skip


def select(only: str | None, quick: bool) -> list[Row]:
    """Rows that `only` lists, as id or id:how the title begins (without it all); `quick`: those with a target."""
    if not only and not quick:  # the others need bitsandbytes, or an hour: asked for by name
        return [row for row in ROWS if row.id not in ("P7", "P9", "P20")]
    wanted = [part.strip().lower().partition(":") for part in only.split(",")] if only else None
    known = {row.id.lower() for row in ROWS} | {"parity"}
    if unknown := sorted({id for id, _, _ in wanted or ()} - known):
        raise SystemExit(f"no such rows: {', '.join(unknown)}; there are {', '.join(sorted(known))}")

    def asked(row: Row) -> bool:
        return wanted is None or any(row.id.lower() == id and row.title.lower().startswith(t) for id, _, t in wanted)

    return [row for row in ROWS if asked(row) and (row.target or not quick)]
