"""`peft serve` with a mix of adapters, against upstream peft without a server and against the base model alone.

    python benchmarks/serving.py --model FOLDER [--output results/serving.md]

The same requests for all: several clients, each of which asks again when its answer has come, every request for another
adapter than the one before. Our side is the whole server over HTTP, with streams; upstream's is `generate` in a process
of its own, without HTTP. Contenders take turns, round by round; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import upstream

SOURCE = Path(__file__).parents[1] / "src"
ADAPTERS = CLIENTS = 8
PROMPTS, ANSWERS = (16, 96), (16, 32, 48, 64)  # tokens
MANY = 100  # adapters
SYSTEM = 400  # tokens of a shared beginning


class Kind(NamedTuple):
    """What the adapters are."""

    title: str
    rank: int
    targets: list[str]


KINDS = {
    "small": Kind("LoRA, rank 8 on queries and values", 8, ["q_proj", "v_proj"]),
    "large": Kind(
        "LoRA, rank 16 on all linear layers",
        16,
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}
TITLES = {
    "ours": "`peft serve`, 8 adapters mixed",
    "base": "`peft serve`, the base model alone",
    "switch": "upstream, `set_adapter` before each request",
    "mixed": "upstream, `adapter_names`, padded batches",
}
CLOCKS = ("seconds", "computed")
WANTED = {"switch": 3.0, "mixed": 2.0, "base": 0.85}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the process that computes")
    parser.add_argument("--python", default=os.environ.get("PEFT_UPSTREAM_PYTHON"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", default="", help="what else is to be known of the run, for the page")
    parser.add_argument("--only", nargs="+", choices=[*TITLES, "many"], default=[*TITLES, "many"], help="contenders")
    args = parser.parse_args()
    page = [introduction(args)]
    for kind in args.adapters:
        with tempfile.TemporaryDirectory() as name:
            page.append(measure(args, KINDS[kind], Path(name)))
    if "many" in args.only:
        with tempfile.TemporaryDirectory() as name:
            page.append(measure_many(args, KINDS[args.adapters[0]], Path(name)))
            page.append(measure_prefix(args))
    print("\n".join(page))
    if args.output:
        args.output.write_text("\n".join(page), encoding="utf-8")


def measure(args: argparse.Namespace, kind: Kind, folder: Path) -> str:
    """All contenders in turn, in one order and in the other; the section of the page."""
    plan = make_plan(args, kind, folder)
    found: dict[str, list[dict]] = {}
    # Rounds ask the same, and nothing may be remembered of the last one.
    with Server(plan["model"], args.threads, plan["adapters"], "--prefix-memory", "0") as server:
        ask_all(server, plan["requests"])  # warm
        for number in range(args.rounds):
            contenders = [who for who in TITLES if who in args.only]
            for who in (contenders, contenders[::-1])[number % 2]:
                if who in ("ours", "base"):
                    result = ask_all(server, plan["requests"], None if who == "ours" else server.base)
                else:
                    result = other(who, args, folder)
                found.setdefault(who, []).append(result)
                print(kind.title, who, *(round(rate(result, clock), 1) for clock in CLOCKS), file=sys.stderr)
    return section(kind, found, plan)


# -- what is asked --------------------------------------------------------------------------------------------------


def make_plan(args: argparse.Namespace, kind: Kind, folder: Path) -> dict:
    from transformers import AutoTokenizer

    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    usable = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    adapters = make_adapters(args.model, kind, folder, ADAPTERS)
    requests = [
        {
            "prompt": rng.choices(usable, k=rng.randint(*PROMPTS)),
            "adapter": list(adapters)[i % ADAPTERS],
            "tokens": rng.choice(ANSWERS),
        }
        for i in range(args.requests)
    ]
    plan = {"model": args.model, "adapters": adapters, "requests": requests}
    plan |= {"threads": args.threads, "clients": CLIENTS}
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def make_adapters(model: str, kind: Kind, folder: Path, count: int) -> dict[str, str]:
    """Adapters of which each says something of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=kind.rank, lora_alpha=kind.rank, target_modules=kind.targets))
    paths = {}
    for number in range(count):
        torch.manual_seed(number)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        paths[f"a{number:03d}"] = str(folder / f"a{number:03d}")
        tuned.save_pretrained(paths[f"a{number:03d}"])
    return paths


# -- our side -------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, model: str, threads: int, adapters: dict[str, str], *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = Path(model).name
        command = [sys.executable, "-m", "peft_run", "serve", "--base", model, "--dtype", "fp32", "--offline"]
        command += ["--port", str(self.port), "--slots", str(CLIENTS), *options]
        command += [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, env=environment)

    def __enter__(self) -> Server:
        while self.process.poll() is None:
            try:
                self.call("GET", "/health")
                return self
            except OSError:
                time.sleep(0.1)
        raise SystemExit("the server did not start")

    def __exit__(self, *problem: object) -> None:
        self.process.kill()
        self.process.wait()

    def call(self, method: str, path: str, body: dict | None = None) -> bytes:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            method, path, None if body is None else json.dumps(body), {"content-type": "application/json"}
        )
        return connection.getresponse().read()

    def computed(self) -> float:
        """Seconds of processor time."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def ask(server: Server, request: dict, model: str | None = None) -> dict:
    """One request as a stream: its text, tokens and times."""
    body = {"model": model or request["adapter"], "prompt": request["prompt"], "max_tokens": request["tokens"]}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    asked, first, text, usage = time.perf_counter(), None, "", None
    connection = HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter()
        part = json.loads(line[6:])
        text += "".join(choice["text"] for choice in part["choices"])
        usage = part.get("usage") or usage
    return {
        "text": text,
        "count": usage["completion_tokens"],
        "asked": asked,
        "first": first,
        "end": time.perf_counter(),
    }


def ask_all(server: Server, requests: list[dict], model: str | None = None) -> dict:
    rows: list[dict | None] = [None] * len(requests)

    def client(number: int) -> None:
        for at in range(number, len(requests), CLIENTS):
            rows[at] = ask(server, requests[at], model)

    start, computed = time.perf_counter(), server.computed()
    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, computed = time.perf_counter() - start, server.computed() - computed
    return {"seconds": seconds, "computed": computed, "requests": rows}


def measure_many(args: argparse.Namespace, kind: Kind, folder: Path) -> str:
    """Bytes and latency while the number of loaded adapters grows to MANY."""
    paths = make_adapters(args.model, kind, folder, MANY)
    size = sum(f.stat().st_size for f in Path(paths["a000"]).glob("*.safetensors"))
    body = {"adapter": "a000", "prompt": list(range(10, 40)), "tokens": 48}
    lines = [
        f"## {MANY} adapters",
        "",
        f"{kind.title}, {size / 1e6:.2f} MB a file. A token of the first one, and the server's memory:",
        "",
        "| loaded | ms a token | MB |",
        "|---|---|---|",
    ]
    resident = {}
    with Server(args.model, args.threads, {}, "--allow-runtime-lora", str(folder)) as server:
        for number, name in enumerate(paths, 1):
            server.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name})
            if number not in (1, MANY // 2, MANY - 1, MANY):
                continue
            rows = [ask(server, body) for _ in range(11)][2:]
            token = statistics.median((row["end"] - row["asked"]) / row["count"] for row in rows)
            resident[number] = server.resident()
            lines.append(f"| {number} | {1000 * token:.2f} | {resident[number] / 1e6:.1f} |")
    each = (resident[MANY] - resident[1]) / (MANY - 1)
    return "\n".join([*lines, "", f"Each further adapter takes {each / 1e6:.2f} MB.", ""])


def measure_prefix(args: argparse.Namespace) -> str:
    """The time to a first token of questions behind one long system prompt, without and with memory for it."""
    rng = random.Random(1)
    system = rng.choices(range(10, 5000), k=SYSTEM)
    lines = [
        "## A shared beginning",
        "",
        f"{SYSTEM} tokens that all prompts begin with, and 16 of their own; first token, p50 of 16:",
        "",
    ]
    for memory in ("0", "256"):
        with Server(args.model, args.threads, {}, "--prefix-memory", memory) as server:
            times = []
            for _ in range(18):
                prompt = system + rng.choices(range(10, 5000), k=16)
                row = ask(server, {"prompt": prompt, "tokens": 4}, server.base)
                times.append(row["first"] - row["asked"])
        lines.append(f"- `--prefix-memory {memory}`: {1000 * statistics.median(times[2:]):.0f} ms")
    return "\n".join(lines) + "\n"


# -- the other side -------------------------------------------------------------------------------------------------


def other(how: str, args: argparse.Namespace, folder: Path) -> dict:
    """Upstream's answers, in a process that imports no code of ours."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    worker = Path(__file__).with_name("serving_upstream.py")
    command = [args.python or upstream.python(), str(worker), how, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    for row in result["requests"]:
        row["count"] = len(row["tokens"])
    return result


# -- the page -------------------------------------------------------------------------------------------------------


def rate(result: dict, clock: str = "seconds") -> float:
    """Tokens a second of time, or of the computing process's processor time."""
    return sum(row["count"] for row in result["requests"]) / result[clock]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


def introduction(args: argparse.Namespace) -> str:
    return (
        f"# Serving\n\n`python benchmarks/serving.py --model {Path(args.model).name}`: {args.requests} requests of "
        f"{CLIENTS} clients, prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, answers of up to "
        f"{', '.join(map(str, ANSWERS))} tokens, greedy, {ADAPTERS} adapters; float32 on {args.threads} CPU thread; "
        f"{args.rounds} rounds. Ours is asked over HTTP and streams; upstream (peft {upstream.VERSION}) runs in a "
        "process of its own without HTTP. A padded batch ends with its longest answer. Processor time is that of the "
        "server, or of upstream's process: where other programs ran beside the benchmark, it says more.\n"
        + (f"\n{args.note}\n" if args.note else "")
    )


def section(kind: Kind, found: dict[str, list[dict]], plan: dict) -> str:
    lines = [
        f"## {kind.title}",
        "",
        "| | tokens/s | of processor time | first token p50 | p99 | answer p50 | p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for who, results in found.items():
        rows = [row for result in results for row in result["requests"]]
        first = [row["first"] - row["asked"] for row in rows]
        whole = [row["end"] - row["asked"] for row in rows]
        cells = [f"{1000 * percentile(values, share):.0f} ms" for values in (first, whole) for share in (0.5, 0.99)]
        speeds = [f"{statistics.median(rate(r, clock) for r in results):.0f}" for clock in CLOCKS]
        lines.append(f"| {TITLES[who]} | {' | '.join([*speeds, *cells])} |")
    lines.append("")
    for who, wanted in WANTED.items():
        if who in found and "ours" in found:
            pairs = list(zip(found["ours"], found[who]))
            wall, computed = (statistics.median(rate(a, c) / rate(b, c) for a, b in pairs) for c in CLOCKS)
            more = f"{computed:.2f} by processor time; target {wanted:g}"
            lines.append(f"- {wall:.2f} times the tokens per second of {TITLES[who]} ({more})")
    for who in ("switch", "mixed"):
        if who in found and "ours" in found:
            same, total = agreement(found["ours"][0], found[who][0], plan)
            lines.append(f"- {same} of {total} answers are the same text as those of {TITLES[who]}")
    return "\n".join(lines) + "\n"


def agreement(ours: dict, theirs: dict, plan: dict) -> tuple[int, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    texts = [tokenizer.decode(row["tokens"], skip_special_tokens=True) for row in theirs["requests"]]
    return sum(row["text"] == text for row, text in zip(ours["requests"], texts)), len(texts)


if __name__ == "__main__":
    main()
