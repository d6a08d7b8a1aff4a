"""Four Chinese tasks on a small model, from real data to merged and exported copies, by the command `peft` alone.

    python benchmarks/chinese_tasks.py --model FOLDER [--tasks zh-qa,zh-poem] [--work DIR] [--output DIR]

Each task is a recipe of `peft recipes`, with the data of `peft fetch`, on one CPU thread. Printed are the command lines
as they are run, then a table: base against tuned on test rows that no training has seen, with 95 % intervals, and how
far the merged and exported copies are from their source. --output receives results.json and a curve for each task.
Runs that are there already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from peft_run.corpora import NAMES
from peft_run.plots import charts
from peft_run.run import Run
from peft_run.svg import chart


class Task(NamedTuple):
    corpus: str  # of `peft fetch`, and the recipe
    recipe: str
    measures: tuple[str, ...]
    changes: tuple[str, ...]  # to the recipe: it is made for larger models, which need other rates


# A model of 26M parameters takes higher rates and ranks than the recipes' 0.5B.
COMMON = (
    *("train.threads=1", "train.lr=2e-3", "adapter.r=32", "train.epochs=100", "train.eval_every=0.25"),
    *("data.eval.split=0.03", "eval.sample=160"),
)
TASKS = {
    "zh-sentiment": Task(
        "zh-sentiment", "recipe.yaml", ("accuracy", "loss"), ("train.steps=100", "train.batch=8", "train.lr=5e-4")
    ),
    "zh-sentiment-head": Task(
        "zh-sentiment", "head.yaml", ("accuracy", "loss"), ("train.steps=140", "train.batch=8", "train.lr=1e-3")
    ),
    "zh-summary": Task(
        "zh-summary",
        "recipe.yaml",
        ("rougeL", "bleu", "loss"),
        ("train.steps=50", "train.batch=4", "train.lr=3e-4", "eval.sample=80"),
    ),
    "zh-qa": Task("zh-qa", "recipe.yaml", ("exact_match", "rougeL", "loss"), ("train.steps=100", "train.batch=8")),
    "zh-poem": Task("zh-poem", "recipe.yaml", ("same_length", "rougeL", "loss"), ("train.steps=100", "train.batch=8")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name below $PEFT_ASSETS")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--work", type=Path, default=Path("chinese-tasks"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train", nargs="*", default=[], metavar="section.key=value", help="further changes")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.tasks.split(","):
        results[name] = carry_out(name, TASKS[name], args)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            path = args.output / "results.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**known, **results}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results))


def carry_out(name: str, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    assert task.corpus in NAMES
    project, data = args.work / task.corpus, args.work / f"{task.corpus}-data"
    commands: list[str] = []

    def peft(*words: object) -> dict[str, Any]:
        line = shlex.join(["peft", *map(str, words)])
        commands.append(line)
        print(f"$ {line}", flush=True)
        command = [sys.executable, "-m", "peft_run", *map(str, words), "--json", "--lang", "en"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=args.work, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        return json.loads(done.stdout) if done.stdout.strip() else {}

    if not project.exists():
        peft("init", task.corpus, project.name)
    if not data.exists():
        peft("fetch", task.corpus, data.name)
    start = cpu_minutes()
    group = args.work / "runs" / name
    if not (group / "latest" / "artefact.json").exists():
        changes = [f"model.path={args.model}", f"output.name={name}", *COMMON, *task.changes, *args.train]
        files = [f"data.train={data.name}/train.jsonl", f"data.test={data.name}/test.jsonl"]
        peft("train", f"{project.name}/{task.recipe}", "-o", "runs", *files, *changes)
    run = Run.open(group)
    if "evaluate" not in run.read_json("metrics.json"):
        peft("evaluate", f"runs/{name}")
    for stage, words in (("merge", ("merge",)), ("export", ("export", "--to", "gguf"))):
        out = args.work / f"{name}-{stage}"
        if not out.exists() and not (stage == "export" and task.recipe != "recipe.yaml"):
            peft(words[0], f"runs/{name}", *words[1:], "-o", out.name)
    metrics = run.read_json("metrics.json")
    found = {"commands": commands, "cpu_minutes": round(cpu_minutes() - start, 1), **metrics}
    found["measures"] = {m: metrics["evaluate"]["metrics"][m] for m in task.measures if m != "same_length"}
    if "same_length" in task.measures:
        found["measures"] = {"same_length": same_length(run), **found["measures"]}
    found["examples"] = examples(run)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.svg").write_text(curve(run, name), encoding="utf-8")
    return found


def cpu_minutes() -> float:
    """Of all commands so far: what a core of one's own would take."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]


def same_length(run: Run) -> dict[str, Any]:
    """The share of answers with as many characters as the line asked, with Wilson's 95 % interval."""
    rows = rows_of(run)
    found: dict[str, Any] = {"samples": len(rows), "higher_is_better": True}
    for side in ("base", "tuned"):
        asked = [row["prompt"].rpartition(": ")[2].splitlines()[-1] for row in rows]
        right = sum(len(row[side]["answer"].strip()) == len(a) for row, a in zip(rows, asked))
        found[side], found[f"{side}_interval"] = right / len(rows), wilson(right, len(rows))
    return found


def wilson(right: int, total: int, z: float = 1.96) -> list[float]:
    p, n = right / total, total
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def examples(run: Run) -> list[dict[str, Any]]:
    """The first three test rows: not picked."""
    return [
        {"prompt": r["prompt"], "reference": r["reference"], "base": r["base"]["answer"], "tuned": r["tuned"]["answer"]}
        for r in rows_of(run)[:3]
        if "base" in r
    ]


def curve(run: Run, title: str) -> str:
    """The smoothed training loss and the held-out loss."""
    _, lines = charts(run.events(), "en")["loss"]
    return chart(title, lines[1:], "step")


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| task | measure | test rows | base | tuned |", "|---|---|--:|--:|--:|"]
    for name, found in results.items():
        for measure, values in found["measures"].items():
            sides = [side_of(values, side) for side in ("base", "tuned")]
            lines.append(f"| {name} | {measure} | {values['samples']} | {sides[0]} | {sides[1]} |")
    lines += [
        "",
        "| task | steps | minutes of training | tokens/s | peak MB | merged: largest logit difference | GGUF |",
    ]
    lines += ["|---|--:|--:|--:|--:|--:|---|"]
    for name, found in results.items():
        train, merge, export = found["train"], found["merge"], found.get("export")
        agreed = f"{export['tokens_agreed']}/{export['tokens']} tokens" if export else "-"
        lines.append(
            f"| {name} | {train['steps']} | {train['seconds'] / 60:.1f} | {train['tokens_per_second']:.0f} "
            f"| {train['peak_memory_mb']:.0f} | {merge['difference']:.1e} | {agreed} |"
        )
    return "\n".join(lines)


def side_of(values: dict[str, Any], side: str) -> str:
    if values.get(side) is None:
        return "-"
    low, high = values[f"{side}_interval"]
    return f"{values[side]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
