"""Does llama.cpp say what the model said? GGUF exports of trained runs, asked in llama.cpp, against transformers.

    python benchmarks/gguf_answers.py --llama-python PATH --zh-model FOLDER [--output results/llama-cpp.md]

PATH is an interpreter with `llama-cpp-python` (0.3.36 builds from PyPI with g++ and cmake). Two runs are trained for a
few steps on the samples of their recipes and exported as F16 and as Q8_0. Compared: the tokens of the prompts as text,
and greedy answers, with those of the merged model in float32, for Q8_0 also with the file's own weights in
transformers. Where answers part, the two likeliest tokens were at most so far from each other as the last column says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 32
KINDS = ("F16", "Q8_0")
QUESTIONS = {
    "en-instruct": [
        "How do I boil an egg?",
        "What is the capital of France?",
        "Name three colours.",
        "Why is the sky blue?",
        "Write a line about the sea.",
        "What do bees make?",
    ],
    "zh-qa": [
        "中国的首都是哪里？",
        "请介绍一下你自己。",
        "怎样学好英语？",
        "写一句关于春天的话。",
        "水为什么会结冰？",
        "谁写了《红楼梦》？",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--zh-model", help="a Chinese Llama; without it only the English run is made")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return llama(Path(args.worker))
    lines = [
        "| model | file | prompts split alike | answers equal | tokens equal | against | rival where one parts |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        for recipe, model in (("en-instruct", None), ("zh-qa", args.zh_model)):
            if recipe == "en-instruct" or model:
                lines += compare(Path(name), recipe, model, args)
    text = (
        f"{args.llama_python and version(args.llama_python)}, greedy, up to {TOKENS} tokens\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


def version(python: str) -> str:
    code = "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def compare(folder: Path, recipe: str, model: str | None, args: argparse.Namespace) -> list[str]:
    """The rows of one run."""
    import torch

    from peft_run.console import silent
    from peft_run.deploy.merge import merged
    from peft_run.gguf_llama import GgufLlama
    from peft_run.run import Run

    peft(folder, "init", recipe, recipe)
    changes = [f"train.steps={args.steps}", "train.threads=1", "track.plots=false"]
    changes += [f"model.path={Path(model).absolute()}"] if model else []
    peft(folder, "train", f"{recipe}/recipe.yaml", "-o", "runs", *changes)
    run = Run.open(folder / "runs" / recipe)
    source, tuned, _ = merged(run, silent())
    rows = [tuned.renderer.prompt([{"role": "user", "content": text}]) for text in QUESTIONS[recipe]]
    texts = [tuned.tokenizer.decode(row) for row in rows]
    found = []
    for kind in KINDS:
        peft(folder, "export", f"runs/{recipe}", "--to", "gguf", "--type", kind, "-o", f"{recipe}-{kind}")
        file = next((folder / f"{recipe}-{kind}").glob("*.gguf"))
        asked = {"file": str(file), "texts": texts, "rows": rows, "stops": tuned.stop_ids}
        told = ask(args.llama_python, folder, asked)
        split = sum(a == b for a, b in zip(told["rows"], rows))
        sources = {"the merged model, float32": source}
        if kind != "F16":
            sources[f"the {kind} file in transformers"] = GgufLlama(file).model(torch.float32).eval()
        for name, one in sources.items():
            answers = [greedy(one, row, tuned.stop_ids) for row in rows]
            same, equal, total, gaps = agreement(one, rows, answers, told["answers"])
            nearest = "" if not gaps else f"{max(gaps):.2g} logits"
            title = Path(run.recipe.model.path).name
            found.append(
                f"| {title} | {kind} | {split} of {len(rows)} | {same} of {len(rows)} | {equal} of {total} | {name} | "
                f"{nearest} |"
            )
    return found


def peft(folder: Path, *words: object) -> None:
    command = [sys.executable, "-m", "peft_run", *map(str, words), "--lang", "en", "--quiet"]
    subprocess.run(command, cwd=folder, check=True)


def ask(python: str, folder: Path, asked: dict) -> dict:
    """What llama.cpp makes of the texts and the rows, in a process that has nothing of ours."""
    plan = folder / "asked.json"
    plan.write_text(json.dumps(asked))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, __file__, "--llama-python", python, "--worker", str(plan)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def llama(plan: Path) -> int:
    from llama_cpp import Llama

    asked = json.loads(plan.read_text())
    model = Llama(asked["file"], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    answers = []
    for row in asked["rows"]:
        model.reset()
        answer = []
        for token in model.generate(row, temp=0.0, top_k=1, repeat_penalty=1.0):
            if token in asked["stops"] or len(answer) == TOKENS:
                break
            answer.append(int(token))
        answers.append(answer)
    rows = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
    print("RESULT " + json.dumps({"rows": rows, "answers": answers}))
    return 0


def greedy(model, row: list[int], stops: list[int]) -> list[int]:
    import torch

    answer: list[int] = []
    while len(answer) < TOKENS:
        with torch.no_grad():
            token = int(model(torch.tensor([row + answer])).logits[0, -1].argmax())
        if token in stops:
            break
        answer.append(token)
    return answer


def agreement(model, rows, ours, theirs) -> tuple[int, int, int, list[float]]:
    """(equal answers, equal tokens from the start, all tokens, how near the two tokens were where answers part)."""
    import torch

    same = equal = total = 0
    gaps = []
    for row, a, b in zip(rows, ours, theirs):
        count = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        same, equal, total = same + (a == b), equal + count, total + max(len(a), len(b))
        if a != b:
            with torch.no_grad():
                best = model(torch.tensor([row + a[:count]])).logits[0, -1].topk(2).values
            gaps.append(float(best[0] - best[1]))
    return same, equal, total, gaps


if __name__ == "__main__":
    sys.exit(main())
