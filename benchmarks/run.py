"""Measures this library against upstream's release: `python benchmarks/run.py`. See README.md in this folder."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import agreement
import plan
import report
import upstream
from contender import Contender, ContenderError

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"


def main() -> int:
    options = parse()
    names = options.contenders.split(",")
    threads = options.threads
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    cores = available[-threads:]
    with tempfile.TemporaryDirectory(prefix="peft-benchmark-") as scratch:
        flags = ("--threads", str(threads), "--cores", ",".join(map(str, cores)))
        flags += ("--scratch", scratch, "--clock", options.clock)
        places = {
            "upstream": lambda: (options.upstream_python or upstream.python(), ""),
            "ours": lambda: (options.ours_python, options.ours_source),
        }
        contenders = {
            name: Contender(name, *places[name](), flags, threads, Path(scratch) / f"{name}.log") for name in names
        }
        try:
            results = measure_everything(options, contenders)
        finally:
            for contender in contenders.values():
                contender.stop()
    report.write(results, options.output)
    return 1 if report.failures(results) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows to run, for example P1,P15; `parity` for the agreement checks")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of every part (default 7)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and only the rows that have a target")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, and cores to stay on (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file; table (.md) and plot (.png) go beside it")
    parser.add_argument("--contenders", default="upstream,ours", help="`ours` alone is enough while tuning")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine")
    parser.add_argument("--ours-python", default=sys.executable)
    parser.add_argument("--ours-source", default=str(SOURCE), help="PYTHONPATH of ours; empty: the installed package")
    parser.add_argument("--upstream-python", help="an environment to use instead of benchmarks/.venv-upstream")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 3)
    if options.output is None:
        options.output = HERE / "results" / f"cpu-{options.threads}-thread.json"
    return options


def measure_everything(options: argparse.Namespace, contenders: dict[str, Contender]) -> dict:
    results = {
        "versions": {name: contender.ask("describe") for name, contender in contenders.items()},
        "machine": report.machine(),
        "options": {"threads": options.threads, "rounds": options.rounds, "clock": options.clock},
        "load_average_before": os.getloadavg()[0],
        "parity": [],
        "rows": [],
    }
    report.require_same_stack(results["versions"])
    next(iter(contenders.values())).ask("write_adapters")
    if len(contenders) == 2 and (not options.only or "parity" in options.only.split(",")):
        say("parity")
        results["parity"] = check_agreement(contenders)
    for row in plan.select(options.only, options.quick):
        started = time.perf_counter()
        result = measure_row(row, contenders, options.rounds)
        results["rows"].append(result)
        report.keep(results, options.output)
        say(f"{report.one_line(result)}  [{time.perf_counter() - started:.0f} s]")
    return results


def check_agreement(contenders: dict[str, Contender]) -> list[dict]:
    try:
        return agreement.check(contenders["upstream"], contenders["ours"])
    except ContenderError as error:
        return [agreement.row("not all compared", {}, {}, str(error), "", False)]


def measure_row(row: plan.Row, contenders: dict[str, Contender], rounds: int) -> dict:
    """Contenders and parts take turns within a round, so that a machine that gets slower does so for all of them."""
    taking_part = [contender for name, contender in contenders.items() if name in row.contenders]
    samples: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, str] = {}
    for contender in taking_part:
        try:
            parts = contender.ask("prepare", case=row.case, arguments=row.arguments)["parts"]
            samples[contender.name] = {part: [] for part in parts}
        except ContenderError as error:
            errors[contender.name] = str(error)
    warm_up = 0 if row.deterministic or row.fresh_process else 1
    for turn in range(1 if row.deterministic else rounds + warm_up):
        order = taking_part if turn % 2 == 0 else taking_part[::-1]
        for contender in order:
            if contender.name in errors:
                continue
            for part, values in samples[contender.name].items():
                try:
                    value = measure(contender, row, part)
                except ContenderError as error:
                    errors[contender.name] = str(error)
                    break
                if turn >= warm_up:
                    values.append(value)
    samples = {name: parts for name, parts in samples.items() if name not in errors}
    return report.row_result(row, samples, errors)


def measure(contender: Contender, row: plan.Row, part: str) -> float:
    if row.fresh_process:
        return contender.measure_in_fresh_process(row.case, row.arguments, part)
    return contender.ask("measure", part=part)["value"]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
