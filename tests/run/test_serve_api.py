"""The server's routes: what OpenAI's clients get, limits, keys, and adapters that come and go."""

import json
import threading
import time

import pytest
import torch
from serving import ADAPTERS, make_adapter, make_adapters

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from peft_run.serve.api import make_app
from peft_run.serve.service import Generator, Limits

KEY = "secret"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    make_adapters(tiny, root)
    return root


def make_service(tiny, adapters, **limits):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    settings = {"slots": 4, "queue": 8, "tokens": 256, "key": KEY, "folder": adapters, **limits}
    service = Generator("tiny", model, AutoTokenizer.from_pretrained(tiny), Limits(**settings))
    for name in ADAPTERS:
        service.offer(name, adapters / name)
    return service


@pytest.fixture
def client(tiny, folder):
    """A client with the key, and `client.service`."""
    with open_client(make_service(tiny, folder)) as client:
        yield client


def open_client(service):
    from starlette.testclient import TestClient

    client = TestClient(make_app(service), raise_server_exceptions=False)
    client.headers["authorization"] = f"Bearer {KEY}"
    client.service = service
    return client


def chat(model="one", text="hi", **more):
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
        "temperature": 0,
        **more,
    }


def events(answer):
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_and_their_answers(client):
    listed = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [("tiny", None), *((n, "tiny") for n in ADAPTERS)]
    answers = {m: client.post("/v1/chat/completions", json=chat(m)).json() for m in ("tiny", *ADAPTERS)}
    texts = {m: answer["choices"][0]["message"]["content"] for m, answer in answers.items()}
    assert len(set(texts.values())) == 4
    assert answers["one"]["usage"]["completion_tokens"] <= 12 and answers["one"]["object"] == "chat.completion"
    again = client.post("/v1/chat/completions", json=chat("tiny:one")).json()
    assert again["choices"][0]["message"]["content"] == texts["one"]


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = chat(n=2, temperature=1, seed=4, logprobs=True, top_logprobs=2, stop=["a", "中"])
    whole = client.post("/v1/chat/completions", json=asked).json()
    stream = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    parts = events(client.post("/v1/chat/completions", json=stream))
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert "".join(p["delta"]["content"] for p in mine) == choice["message"]["content"]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        rows = [row for p in mine for row in p["logprobs"]["content"]]
        assert [row["token"] for row in rows] == [row["token"] for row in choice["logprobs"]["content"]]
        for row in rows:
            assert row["logprob"] <= row["top_logprobs"][0]["logprob"] <= 0
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    assert client.post("/v1/chat/completions", json=asked).json()["choices"] == whole["choices"]


def test_completions_take_texts_and_tokens(client):
    asked = {"model": "two", "temperature": 0, "max_tokens": 5, "logprobs": 1}
    ids = client.service.tokenizer("abc")["input_ids"]
    both = client.post("/v1/completions", json={**asked, "prompt": ["abc", "x"]}).json()["choices"]
    one = client.post("/v1/completions", json={**asked, "prompt": ids}).json()["choices"]
    assert len(both) == 2 and both[0]["text"] == one[0]["text"] and both[1]["index"] == 1
    figures = [c["logprobs"]["token_logprobs"] for c in (both[0], one[0])]
    assert figures[0] == pytest.approx(figures[1], abs=1e-5) and len(figures[0]) == len(one[0]["logprobs"]["tokens"])


def test_embeddings_are_means_of_the_last_states(client):
    import base64

    import numpy as np
    from transformers import AutoModelForCausalLM

    asked = {"model": "tiny", "input": ["abc", "some text"]}
    found = client.post("/v1/embeddings", json=asked).json()["data"]
    model = AutoModelForCausalLM.from_pretrained(client.service.model.name_or_path, dtype=torch.float32)
    ids = torch.tensor([client.service.tokenizer("abc")["input_ids"]])
    with torch.no_grad():
        mean = model.model(input_ids=ids).last_hidden_state[0].mean(0)
    assert found[0]["embedding"] == pytest.approx(mean.tolist(), abs=1e-5)
    packed = client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()["data"]
    assert np.frombuffer(base64.b64decode(packed[1]["embedding"]), "<f4").tolist() == pytest.approx(
        found[1]["embedding"]
    )
    tuned = client.post("/v1/embeddings", json={**asked, "model": "one"}).json()["data"]
    assert tuned[0]["embedding"] != found[0]["embedding"]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 10**9}, 400, "n"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 255}, 400, None),
        ({"top_logprobs": -1}, 400, "top_logprobs"),
        ({"seed": 2**63}, 400, "seed"),
        ({"stop": ["x"] * 10**5}, 400, "stop"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages.content"),
        ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ({"text": "x" * 400}, 400, None),
    ],
)
def test_what_is_wrong_is_named(client, change, status, param):
    answer = client.post("/v1/chat/completions", json=chat(**change))
    assert answer.status_code == status
    problem = answer.json()["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert problem["message"] and (param is None or problem["param"].startswith(param))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100_000, b'{"model": NaN}', b"\x00", b'{"model": "\\ud800"}', json.dumps(chat("\x00")).encode()],
)
def test_hostile_bodies_are_refused(client, body):
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]
    lone = json.dumps(chat(text="\ud800")).encode()
    answer = client.post("/v1/chat/completions", content=lone, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500


def test_nothing_but_health_answers_without_the_key(client):
    paths = [route.path for route in client.app.app.routes] + ["/none", "/openapi.json"]
    assert len(paths) > 8
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
        for path in paths:
            for method in ("GET", "POST", "OPTIONS"):
                status = client.request(method, path, headers=headers).status_code
                assert status == 401 or path == "/health", (method, path)
    assert client.get("/health", headers={"authorization": ""}).status_code == 200


def test_large_bodies_are_refused_before_they_are_read(tiny, folder):
    with open_client(make_service(tiny, folder, body=1000)) as client:
        assert client.post("/v1/chat/completions", json=chat(text="x" * 2000)).status_code == 413
        chunks = (b"x" * 600 for _ in range(3))
        assert client.post("/v1/chat/completions", content=chunks).status_code == 413
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_full_queue_is_429(client):
    gate = threading.Event()
    blocked = client.service.engine.call(lambda: gate.wait(30))  # an end, should nothing be refused below
    many = chat(n=9)
    answer = client.post("/v1/chat/completions", json=many)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["type"] == "rate_limit_error"
    gate.set()
    blocked.result()
    assert client.post("/v1/chat/completions", json=chat(n=8)).status_code == 200


def test_a_late_answer_is_a_timeout_and_frees_its_slot(tiny, folder):
    with open_client(make_service(tiny, folder, seconds=0.0)) as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 504
        assert not client.service.engine.running and client.service.engine.cache.rows == 0


def test_adapters_come_go_and_are_replaced(client, folder, tiny):
    def text(name):
        return client.post("/v1/chat/completions", json=chat(name)).json()["choices"][0]["message"]["content"]

    def load(name, path, **more):
        return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})

    make_adapter(tiny, folder / "new", seed=50)
    assert load("new", "new").status_code == 200
    first = text("new")
    assert load("new", "new").status_code == 400
    make_adapter(tiny, folder / "new", seed=51)
    assert load("new", "new", load_inplace=True).status_code == 200
    assert text("new") != first
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert client.post("/v1/chat/completions", json=chat("new")).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404
    assert text("one") and load("tiny", "one").status_code == 400


def test_no_path_leads_out_of_the_folder(client, folder, tiny, tmp_path):
    make_adapter(tiny, tmp_path / "outside", seed=3)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "inside").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "inside" / file).symlink_to(tmp_path / "outside" / file)
    beside = folder.with_name(folder.name + "_evil")
    make_adapter(tiny, beside, seed=3)
    escapes = (
        str(tmp_path / "outside"),
        "../../etc",
        "link",
        "inside",
        f"../{beside.name}",
        ".",
        "a\0b",
        "none",
        "x" * 4000,
    )
    for path in escapes:
        answer = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert answer.status_code == 400, path
    for name in ("../x", "/etc/x", "a b", "a\0"):
        assert client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "one"}).status_code == 400


def test_loading_is_off_unless_allowed(tiny, folder):
    with open_client(make_service(tiny, folder, folder=None)) as client:
        asked = {"lora_name": "x", "lora_path": str(folder / "one")}
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 404


def test_what_was_loaded_is_there_after_a_restart(tiny, folder, tmp_path):
    state = tmp_path / "state.json"
    make_adapter(tiny, folder / "kept", seed=60)
    with open_client(make_service(tiny, folder, state=state)) as client:
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "kept"}).status_code == 200
    service = make_service(tiny, folder, state=state)
    assert service.recall() == [] and "kept" in service.adapters.known


def test_many_clients_and_adapters_that_come_and_go(client, folder, tiny):
    """Every answer under load is the one that was given alone."""
    make_adapter(tiny, folder / "guest", seed=70)
    asked = [chat(m, text, temperature=t, seed=3) for m in ("tiny", *ADAPTERS) for text in ("a", "bcd") for t in (0, 1)]

    def answer(body):
        while (found := client.post("/v1/chat/completions", json=body)).status_code == 429:
            time.sleep(0.02)
        return found.json()["choices"][0]["message"]["content"]

    alone, wrong = [answer(body) for body in asked], []

    def work(start):
        for i in range(len(asked)):
            at = (start + 5 * i) % len(asked)
            if answer(asked[at]) != alone[at]:
                wrong.append(asked[at])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert (
            client.post("/v1/load_lora_adapter", json={"lora_name": "guest", "lora_path": "guest"}).status_code == 200
        )
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "guest"}).status_code == 200
    assert not wrong
    values = client.service.engine.metrics.values
    assert values["step_rows_total"] > 1.5 * values["steps_total"]


def test_metrics_and_readiness(client):
    client.post("/v1/chat/completions", json=chat())
    text = client.get("/metrics").text
    for name in ("generated_tokens_total", "adapters_loaded", "adapter_bytes", "time_to_first_token_seconds_sum"):
        assert f"\npeft_{name} " in text, name
    assert 'peft_responses_total{status="200"}' in text
    assert client.get("/ready").status_code == 200
    client.service.engine.close(5)
    assert client.get("/ready").status_code == 503
    assert client.post("/v1/chat/completions", json=chat()).status_code == 503
