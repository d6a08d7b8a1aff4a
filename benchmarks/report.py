"""From samples to metrics, and from metrics to the table, the JSON file and the plot.

`python benchmarks/report.py results.json` prints the table of an earlier run again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import sys
from pathlib import Path
from statistics import median

import plan


def machine() -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        model = next(lines, model)
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system()}


def require_same_stack(versions: dict[str, dict]) -> None:
    """A ratio means something only if the library is the one thing that differs."""
    stacks = [{key: value for key, value in version.items() if key != "peft"} for version in versions.values()]
    if any(stack != stacks[0] for stack in stacks):
        raise SystemExit(f"the environments differ in more than peft: {json.dumps(versions, indent=2)}")


def row_result(row: plan.Row, samples: dict, errors: dict[str, str]) -> dict:
    metrics = compute_metrics(samples)
    kind, bound = row.target or (None, None)
    met = None
    if kind and metrics.get(kind) is not None:
        met = metrics[kind] >= bound if kind == "speedup" else metrics[kind] <= bound
    return {
        "id": row.id,
        "title": row.title,
        "unit": row.unit,
        "target": {"metric": kind, "bound": bound, "moonshot": row.moonshot} if kind else None,
        "metrics": metrics,
        "interval": None if row.deterministic else overhead_interval(samples),
        "met": met,
        "samples": samples,
        "errors": errors,
    }


def compute_metrics(samples: dict[str, dict[str, list[float]]]) -> dict[str, float | None]:
    """Every ratio is the median of the rounds' ratios: both numbers of a ratio were measured one after the other."""
    upstream, ours = samples.get("upstream", {}), samples.get("ours", {})
    theirs_of_floor = paired(upstream.get("adapted"), upstream.get("floor"))
    ours_of_floor = paired(ours.get("adapted"), ours.get("floor"))
    return {
        "floor": middle([*upstream.get("floor", []), *ours.get("floor", [])]),
        "upstream": middle(upstream.get("adapted")),
        "ours": middle(ours.get("adapted")),
        "of_floor_upstream": theirs_of_floor,
        "of_floor": ours_of_floor,
        "speedup": paired(upstream.get("adapted"), ours.get("adapted")),
        "of_upstream": paired(ours.get("adapted"), upstream.get("adapted")),
        "overhead_left": overhead_left(theirs_of_floor, ours_of_floor),
        "value": middle(ours.get("adapted")),
    }


def overhead_left(upstream_of_floor: float | None, ours_of_floor: float | None) -> float | None:
    """(ours - floor) / (upstream - floor). Each library is held against the floor in its own process."""
    if upstream_of_floor is None or ours_of_floor is None or upstream_of_floor <= 1:
        return None
    return (ours_of_floor - 1) / (upstream_of_floor - 1)


def overhead_interval(samples: dict[str, dict[str, list[float]]]) -> list[float] | None:
    """Where the overhead left lies in 90 % of bootstrap resamples of the rounds."""
    sides = [samples.get(name, {}) for name in ("upstream", "ours")]
    if not all(side.get("floor") and side.get("adapted") for side in sides):
        return None
    draw = random.Random(0)
    rounds = range(len(sides[0]["floor"]))
    found = []
    for _ in range(500):
        picked = draw.choices(rounds, k=len(rounds))
        ratios = [median(side["adapted"][i] / side["floor"][i] for i in picked) for side in sides]
        found.append(overhead_left(*ratios))
    known = sorted(value for value in found if value is not None)
    return [known[len(known) // 20], known[-1 - len(known) // 20]] if known else None


def paired(numerators: list[float] | None, denominators: list[float] | None) -> float | None:
    if not numerators or not denominators or not all(denominators):
        return None
    return median(a / b for a, b in zip(numerators, denominators))


def middle(values: list[float] | None) -> float | None:
    return median(values) if values else None


def failures(results: dict) -> list[str]:
    """What makes the run fail: disagreement and cases that raised, not missed targets."""
    found = [row["title"] for row in results["parity"] if not row["agrees"]]
    return found + [row["title"] for row in results["rows"] if row["errors"]]


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms")):
            if value * factor >= 1:
                return f"{value * factor:.3g} {name}"
        return f"{value * 1e6:.3g} µs"
    if unit == "B":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.6g}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def target_text(row: dict) -> str:
    target = row["target"]
    if not target:
        return ""
    text = plan.TARGETS[target["metric"]].format(f"{target['bound']:g}")
    if target["metric"] == "value" and row["unit"]:
        text += f" {row['unit']}"
    return text + (f" (moonshot {target['moonshot']:g})" if target["moonshot"] else "")


def one_line(row: dict) -> str:
    metrics = row["metrics"]
    amounts = ", ".join(f"{name} {amount(metrics[name], row['unit'])}" for name in ("floor", "upstream", "ours"))
    ratios = (
        f"upstream/floor {number(metrics['of_floor_upstream'])}, ours/floor {number(metrics['of_floor'])}, "
        f"upstream/ours {number(metrics['speedup'])}, overhead left {number(metrics['overhead_left'])}"
    )
    errors = "".join(f"\n    {error.strip()}" for error in row["errors"].values())
    return f"{row['id']:4} {row['title']}: {amounts}; {ratios}{errors}"


def table(results: dict) -> str:
    lines = [describe_run(results), ""]
    if results["parity"]:
        lines += parity_table(results["parity"])
    lines += [
        "| row | what | floor | upstream | ours | upstream ÷ floor | ours ÷ floor | upstream ÷ ours "
        "| overhead left (90 %) | target | met |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in results["rows"]:
        metrics, unit = row["metrics"], row["unit"]
        left = number(metrics["overhead_left"])
        if row["interval"]:
            left += f" ({number(row['interval'][0])}–{number(row['interval'][1])})"
        cells = [
            row["id"],
            row["title"],
            *(amount(metrics[name], unit) for name in ("floor", "upstream", "ours")),
            *(number(metrics[name]) for name in ("of_floor_upstream", "of_floor", "speedup")),
            left,
            target_text(row),
            {None: "failed" if row["errors"] else "", True: "yes", False: "**no**"}[row["met"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *failure_lines(results)]
    return "\n".join(lines)


def describe_run(results: dict) -> str:
    options, here = results["options"], results["machine"]
    version = next(iter(results["versions"].values()))
    return (
        f"{options['threads']} thread(s), {options['rounds']} rounds, {options['clock']} clock, "
        f"torch {version['torch']}, transformers {version['transformers']}, "
        f"{here['processor']} ({here['cores']} cores), "
        f"load average {results['load_average_before']:.1f} at the start"
    )


def parity_table(rows: list[dict]) -> list[str]:
    lines = [
        "| same result? | loss upstream / ours | gradient norm upstream / ours | difference | tolerance | agrees |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        pairs = [" / ".join("–" if x is None else f"{x:.6g}" for x in row[key]) for key in ("loss", "gradient_norm")]
        found = row["found"].strip().splitlines()[-1]
        agrees = "yes" if row["agrees"] else "**no**"
        lines.append(f"| {row['title']} | {pairs[0]} | {pairs[1]} | {found} | {row['tolerance']} | {agrees} |")
    return [*lines, ""]


def failure_lines(results: dict) -> list[str]:
    lines = []
    for row in results["rows"]:
        for name, error in row["errors"].items():
            lines.append(f"- {row['title']}, {name}: {error.strip().splitlines()[-1]}")
    return lines


def plot(results: dict, file: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    timed = [row for row in results["rows"] if row["unit"] == "s" and row["metrics"]["speedup"]]
    near_floor = [row for row in timed[::-1] if (row["metrics"]["of_floor_upstream"] or math.inf) < 5]
    others = [row for row in timed[::-1] if row not in near_floor]
    heights = [len(near_floor) + 2, len(others) + 2]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 1 + 0.3 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    grey, blue = "#9aa0a6", "#1a5fb4"
    for place, row in enumerate(near_floor):
        pair = (row["metrics"]["of_floor_upstream"], row["metrics"]["of_floor"])
        top.plot(pair, (place, place), color=grey, linewidth=1, zorder=1)
        top.scatter(pair, (place, place), color=(grey, blue), zorder=2)
    top.set_yticks(range(len(near_floor)), [row["title"] for row in near_floor])
    top.set(title="time as a multiple of the floor (grey: upstream, blue: ours)")
    bars = bottom.barh([row["title"] for row in others], [row["metrics"]["speedup"] for row in others], color=blue)
    bottom.bar_label(bars, [f" {number(row['metrics']['speedup'])}x" for row in others])
    bottom.set(title="times faster than upstream", xscale="log")
    for panel in (top, bottom):
        panel.axvline(1, color="black", linewidth=0.8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def keep(results: dict, file: Path) -> None:
    """What is measured so far, for a run that does not come to its end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def write(results: dict, file: Path) -> None:
    keep(results, file)
    text = table(results)
    file.with_suffix(".md").write_text(text + "\n")
    plot(results, file.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
