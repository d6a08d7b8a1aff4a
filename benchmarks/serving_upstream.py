"""The other side of serving.py, run by an interpreter with peft==0.21.2: answers to the same requests, no server.

    python serving_upstream.py switch|mixed FOLDER

FOLDER/plan.json: model, adapters {name: path}, clients, requests [{prompt, adapter, tokens}]. Prints a line of JSON:
seconds, by the clock and ("computed") of processor time, and for each request its tokens, when its client could ask
("asked"), its first token ("first") and its end.

switch: one request after the other, `set_adapter` before each. mixed: as many as there are clients in one batch, padded
on the left, with `adapter_names`; the batch ends with its longest answer.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from peft import PeftModel


class FirstToken(BaseStreamer):
    """Notes when the first token comes; the prompt is put, too."""

    def __init__(self) -> None:
        self.calls, self.at = 0, None

    def put(self, value) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def main() -> None:
    how, folder = sys.argv[1], Path(sys.argv[2])
    plan = json.loads((folder / "plan.json").read_text())
    torch.set_num_threads(plan["threads"])
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32)
    names = list(plan["adapters"])
    model = PeftModel.from_pretrained(model, plan["adapters"][names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(plan["adapters"][name], adapter_name=name)
    model.eval()
    model.generation_config.eos_token_id = None  # all answers are as long as asked for
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    work = {"switch": switch, "mixed": mixed}[how]
    clients = plan["clients"]
    work(model, plan["requests"][:clients], clients, padding)  # warm
    start, computed = time.perf_counter(), time.process_time()
    rows = work(model, plan["requests"], clients, padding)
    seconds, computed = time.perf_counter() - start, time.process_time() - computed
    rows = [{**row, **{k: row[k] - start for k in ("asked", "first", "end")}} for row in rows]
    print("RESULT " + json.dumps({"seconds": seconds, "computed": computed, "requests": rows}))


@torch.inference_mode()
def switch(model, requests, clients, padding):
    start = time.perf_counter()
    rows = []
    for number, request in enumerate(requests):
        first = FirstToken()
        model.set_adapter(request["adapter"])
        prompt = torch.tensor([request["prompt"]])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["tokens"],
            do_sample=False,
            pad_token_id=padding,
            streamer=first,
        )
        # The client asks again when it has the answer to its last request.
        asked = start if number < clients else rows[number - clients]["end"]
        tokens = out[0, prompt.shape[1] :].tolist()
        rows.append({"tokens": tokens, "asked": asked, "first": first.at, "end": time.perf_counter()})
    return rows


@torch.inference_mode()
def mixed(model, requests, clients, padding):
    rows = []
    for at in range(0, len(requests), clients):
        part = requests[at : at + clients]
        width = max(len(r["prompt"]) for r in part)
        ids = torch.tensor([[padding] * (width - len(r["prompt"])) + r["prompt"] for r in part])
        mask = torch.tensor([[0] * (width - len(r["prompt"])) + [1] * len(r["prompt"]) for r in part])
        asked, first = time.perf_counter(), FirstOfBatch()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(r["tokens"] for r in part),
            do_sample=False,
            pad_token_id=padding,
            logits_processor=[first],
            adapter_names=[r["adapter"] for r in part],
        )
        end = time.perf_counter()
        for row, request in zip(out[:, width:].tolist(), part):
            rows.append({"tokens": row[: request["tokens"]], "asked": asked, "first": first.at, "end": end})
    return rows


class FirstOfBatch:
    """Streamers take no batches; a logits processor sees each step. The first one is called with the first logits."""

    def __init__(self) -> None:
        self.at = None

    def __call__(self, ids, scores):
        self.at = self.at or time.perf_counter()
        return scores


if __name__ == "__main__":
    main()
