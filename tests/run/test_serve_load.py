"""Sixteen clients, six adapters and the base, while adapters come and go: every answer is the one given alone."""

import itertools
import json
import random
import statistics
import threading
import time
import urllib.error

import pytest
from serving import Server, make_adapter, make_adapters

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

NAMES = ("a1", "a2", "a3", "a4", "a5", "a6")
CLIENTS = 16
STEPS = {8: 0, 180: 9_000}  # of the server, at least, by the seconds of a test


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    make_adapters(tiny, root, NAMES)
    make_adapter(tiny, root / "left", 41)
    make_adapter(tiny, root / "right", 42)
    return root


def bodies():
    prompts = ["a", "hello there", "x" * 70, "x" * 70 + "y", "中文" * 9]
    for model, prompt, temperature in itertools.product(("tiny", *NAMES), prompts, (0, 1)):
        settings = {"temperature": temperature, "seed": 3, "max_tokens": 16, "logprobs": 0}
        yield {"model": model, "prompt": prompt, **settings}


def ask(server, body, stream=False):
    """(tokens, log-probabilities, finish reason) of the first choice."""
    while True:
        try:
            if not stream:
                found = [server.post("/v1/completions", body)["choices"][0]]
            else:
                text = server.post("/v1/completions", {**body, "stream": True})
                events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
                found = [event["choices"][0] for event in events]
            tokens = [token for part in found for token in part["logprobs"]["tokens"]]
            figures = [value for part in found for value in part["logprobs"]["token_logprobs"]]
            return tokens, figures, found[-1]["finish_reason"]
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            time.sleep(0.02)


def same(one, other):
    return one[0] == other[0] and one[2] == other[2] and all(abs(a - b) < 1e-3 for a, b in zip(one[1], other[1]))


@pytest.mark.parametrize("seconds", [8, pytest.param(180, marks=pytest.mark.slow)])
def test_nobody_gets_anothers_answer(tiny, folder, seconds):
    adapters = {name: folder / name for name in NAMES}
    options = ("--slots", 12, "--queue", 24, "--max-tokens", 300, "--prefix-memory", 1, "--allow-runtime-lora", folder)
    asked = list(bodies())
    wrong, answered, stop = [], [], threading.Event()
    with Server(tiny, adapters, *options) as server:
        alone = [ask(server, body) for body in asked]
        guests = {}
        for path in ("left", "right"):
            server.post("/v1/load_lora_adapter", {"lora_name": "guest", "lora_path": path, "load_inplace": True})
            guests[path] = ask(server, {**asked[0], "model": "guest"})
        assert len({str(answer[0]) for answer in (*alone[::10], *guests.values())}) > 5

        def client(number):
            rng = random.Random(number)
            try:
                while not stop.is_set():
                    at = rng.randrange(len(asked))
                    stream = rng.random() < 0.5
                    if not same(found := ask(server, asked[at], stream), alone[at]):
                        wrong.append((asked[at], stream, found, alone[at]))
                    answered.append(1)
            except Exception as error:
                wrong.append(error)

        def guest():
            """Loaded in turn as one and as the other; what is asked meanwhile may meet either, or neither."""
            try:
                for turn in itertools.count():
                    if stop.is_set():
                        return
                    path = ("left", "right")[turn % 2]
                    load = {"lora_name": "guest", "lora_path": path, "load_inplace": True}
                    server.post("/v1/load_lora_adapter", load)
                    if not same(ask(server, {**asked[0], "model": "guest"}), guests[path]):
                        wrong.append(path)
                    if turn % 3 == 2:
                        server.post("/v1/unload_lora_adapter", {"lora_name": "guest"})
                        body = json.dumps({**asked[0], "model": "guest"})
                        kind = {"content-type": "application/json"}
                        status, _, _ = server.send("POST", "/v1/completions", body, **kind)
                        if status != 404:
                            wrong.append(status)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        threads.append(threading.Thread(target=guest))
        for thread in threads:
            thread.start()
        sizes = []
        begun = time.monotonic()
        # On a busy machine it takes longer until all lengths of prompts have been met, and memory has come to rest.
        while not wrong and (time.monotonic() < begun + seconds or server.metric("steps_total") < STEPS[seconds]):
            time.sleep(seconds / 40)
            sizes.append((time.monotonic() - begun, server.resident()))
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[:3]
        assert len(answered) > 10 * seconds
        steps, rows = server.metric("steps_total"), server.metric("step_rows_total")
        assert rows > 3 * steps
        assert server.metric("engine_errors_total") == 0 and server.metric("adapter_loads_total") > 7
        warm = sizes[len(sizes) // 2 :]
        per_minute = statistics.linear_regression(*zip(*warm)).slope * 60
        assert per_minute < (1 << 20 if seconds > 60 else 64 << 20), sizes
