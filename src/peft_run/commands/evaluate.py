"""`peft evaluate`."""

from __future__ import annotations

import argparse

HELP = {"en": "judge runs: base against tuned, with intervals", "zh": "评测运行结果：基座与微调后对比，附置信区间"}
ALIASES = ("eval",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or an experiment's for its latest run")
    parser.add_argument(
        "--fail-under",
        action="append",
        default=[],
        metavar="MEASURE=VALUE",
        help="exit 5 where a measure is worse than this: accuracy=0.8, loss=2.1, forgetting=1.5; may be repeated",
    )
    parser.add_argument("--data", metavar="FILE", help="what to judge on: data.test")
    parser.add_argument("--sample", metavar="N", help="judge at most N rows: eval.sample")
    parser.add_argument(
        "--against-full",
        action="store_true",
        help="also train every weight by the same recipe, for the same steps, and compare; takes time and memory",
    )
    parser.add_argument(
        "--full-lr", type=float, metavar="RATE", help="its learning rate; default: a tenth of the run's"
    )
    parser.set_defaults(free_options=True)  # eval.*, data.test and where the model is may be changed


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json
    from peft_run.evaluate import evaluate, gates
    from peft_run.evaluate.changes import recipe_with, split

    limits = gates.parse(args.fail_under)
    paths, overrides = split(args)
    runs = [recipe_with(path, overrides) for path in paths]
    if args.against_full:
        from peft_run.evaluate.full import full_recipe

        for run, recipe in runs:  # what cannot be is refused before the work
            full_recipe(run, recipe, args.full_lr)
    results = []
    for run, recipe in runs:
        with args.console.copied_to(run / "run.log"):
            result = evaluate(run, recipe, args.console, wanted=list(limits))
        results.append({"run": str(run.path), **result})
        if not args.json:
            show(run, result, args)
        if args.against_full:
            results[-1]["against_full"] = show_full(run, recipe, args)
    if args.json:
        print_json({"runs": results})
    for result in results:
        gates.check(result, limits)
    return 0


def show(run, result, args: argparse.Namespace) -> None:
    from peft_run.columns import columns
    from peft_run.evaluate import report
    from peft_run.messages import sentence

    print(sentence("evaluate.title", args.lang, name=run.path))
    header, rows = report.metrics_table(result, args.lang)
    print(columns([header, *rows]))
    if result["forgetting"]:
        print()
        print(sentence("evaluate.forgetting_title", args.lang))
        header, rows = report.forgetting_table(result, args.lang)
        print(columns([header, *rows]))
    for note in result["notes"]:
        print(sentence(note["note"], args.lang, **note))
    args.console("evaluate.done", path=run / report.PAGE)


def show_full(run, recipe, args: argparse.Namespace) -> dict:
    """The comparison with full fine-tuning; its measures, as JSON."""
    from peft_run.columns import columns
    from peft_run.compare import page
    from peft_run.evaluate import full

    result = full.against_full(run, recipe, args.console, lr=args.full_lr)
    if not args.json:
        for header, rows in (page.table(result, args.lang), page.facts_table(result, args.lang)):
            print("\n" + columns([header, *rows]))
        args.console("evaluate.done", path=run / full.PAGE)
    return result["measures"]
