"""Labels, tags and spans over the server's routes: what `peft predict` says, for rows that come in any mixture."""

import argparse
import json
import threading

import pytest
from test_predict import answers
from test_serve_api import open_client
from test_tasks import QUESTIONS, TAGGED
from test_train import CHATS, REVIEWS, train_one

pytest.importorskip("fastapi")

from peft_run.serve.start import make_service

ROWS = {
    "seq_cls": [{"text": "good " * n} for n in (1, 3, 40)],
    "token_cls": [{"tokens": ["Ann", "met", "Bob"]}, {"tokens": ["in", "Oslo"]}],
    "qa": [
        {"question": "where?", "context": "xx at Rome yy"},
        {"question": "where?", "context": "a" * 60 + " at Oslo"},
    ],
}
DATA = {"seq_cls": REVIEWS, "token_cls": TAGGED, "qa": QUESTIONS, "causal_lm": CHATS}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """{task: run}"""
    root = tmp_path_factory.mktemp("heads")

    def train(task):
        folder = root / task
        folder.mkdir()
        output = {"dir": str(folder / "runs"), "name": task.replace("_", "-")}
        settings = {"data": {"max_length": 64}, "train": {"steps": 4, "lr": 1e-2}, "output": output}
        return train_one(folder, tiny, DATA[task], task=task, **settings)[0]

    return {task: train(task) for task in DATA}


def service_of(runs, **options):
    from peft_run.console import silent

    settings = {"adapter": [], "pin": [], "base": None, "served_name": None, "allow_runtime_lora": None}
    settings |= {"device": "cpu", "dtype": "fp32", "slots": 4, "queue": 8, "max_tokens": 256, "timeout": 60.0}
    settings |= {"adapter_memory": None, "prefix_memory": 1, "no_packing": False, "state": None, "console": silent()}
    return make_service(argparse.Namespace(runs=[str(run.path) for run in runs], **(settings | options)), None)


@pytest.fixture
def client(runs):
    with open_client(service_of(runs.values())) as client:
        yield client


def ask(client, task, row):
    if task == "seq_cls":
        return client.post("/v1/classify", json={"model": "seq-cls", "input": row["text"]})
    if task == "token_cls":
        return client.post("/v1/token-classify", json={"model": "token-cls", "input": row["tokens"]})
    return client.post("/v1/qa", json={"model": "qa", **row})


FIELDS = {"seq_cls": "label", "token_cls": "tags", "qa": "answer"}


@pytest.mark.parametrize("task", list(ROWS))
def test_answers_are_those_of_predict(client, runs, task, tmp_path):
    expected = answers(runs[task], ROWS[task], tmp_path)
    for row, wanted in zip(ROWS[task], expected, strict=True):
        answer = ask(client, task, row)
        assert answer.status_code == 200, answer.text
        (found,) = answer.json()["data"]
        assert found.pop(FIELDS[task]) == wanted["prediction"] and found.pop("index") == 0
        for name, value in found.items():
            assert value == pytest.approx(wanted[name], abs=1e-4) if name != "entities" else value == wanted[name]


def test_several_texts_are_answered_in_their_order(client):
    texts = [row["text"] for row in ROWS["seq_cls"]]
    alone = [client.post("/v1/classify", json={"model": "seq-cls", "input": t}).json()["data"][0] for t in texts]
    found = client.post("/v1/classify", json={"model": "seq-cls", "input": texts}).json()["data"]
    assert [row["index"] for row in found] == [0, 1, 2]
    for one, other in zip(alone, found, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    paired = {"model": "seq-cls", "input": texts, "pair": texts[:2]}
    answer = client.post("/v1/classify", json=paired)
    assert answer.status_code == 400 and "pair" in answer.json()["error"]["message"]


def test_requests_that_wait_are_answered_together_and_one_bad_text_spoils_none(client):
    head, engine = client.service.heads["qa"], client.service.engine
    gate = threading.Event()
    blocked = engine.call(gate.wait)
    rows = [*ROWS["qa"], {"question": "q" * 500, "context": "x"}]
    futures = [head.ask(engine, head.samples([row])) for row in rows]
    batches = []
    look, head.look = head.look, lambda samples: (batches.append(len(samples)), look(samples))[1]
    gate.set()
    blocked.result()
    found = [future.result(30) for future in futures[:2]]
    with pytest.raises(Exception, match="question"):
        futures[2].result(30)
    assert batches[0] == 3
    assert [seen.answer for (seen,) in found] == [look(head.samples([row]))[0].answer for row in rows[:2]]


def test_the_wrong_route_is_named(client):
    wrong = client.post("/v1/qa", json={"model": "seq-cls", "question": "a", "context": "b"})
    assert wrong.status_code == 400 and "/v1/classify" in wrong.json()["error"]["message"]
    chat = {"model": "qa", "messages": [{"role": "user", "content": "hi"}]}
    wrong = client.post("/v1/chat/completions", json=chat)
    assert wrong.status_code == 400 and "/v1/qa" in wrong.json()["error"]["message"]
    assert client.post("/v1/classify", json={"model": "none", "input": "x"}).status_code == 404
    writer = client.post("/v1/classify", json={"model": "causal-lm", "input": "x"})
    assert writer.status_code == 400 and "chat" in writer.json()["error"]["message"]
    for body in ({"input": []}, {"input": ""}, {"input": [""]}, {"input": 3}, {"input": "x", "more": 1}):
        assert client.post("/v1/classify", json={"model": "seq-cls", **body}).status_code == 400, body
    assert client.post("/v1/token-classify", json={"model": "token-cls", "input": [[]]}).status_code == 400


def test_models_say_their_task_and_what_is_equal_lies_in_memory_once(client, runs):
    cards = {card["id"]: card.get("task") for card in client.get("/v1/models").json()["data"]}
    assert cards == {"tiny": None, "causal-lm": None, "seq-cls": "seq_cls", "token-cls": "token_cls", "qa": "qa"}
    # Not the one for spans: transformers begins a Llama with such a layer from new weights.
    named = client.service.model.named_parameters()
    base = {p.data_ptr() for name, p in named if "lora_" not in name and "lm_head" not in name}
    for name in ("seq-cls", "token-cls"):
        assert base <= {p.data_ptr() for p in client.service.heads[name].tuned.model.parameters()}


def test_a_server_of_heads_alone_needs_no_model_that_writes(runs):
    with open_client(service_of([runs["seq_cls"], runs["qa"]])) as client:
        assert ask(client, "seq_cls", ROWS["seq_cls"][0]).status_code == 200
        assert client.post("/v1/chat/completions", json={"model": "qa"}).status_code == 404
        assert "jobs_waiting" in client.get("/metrics").text and client.get("/ready").json() == {"ready": True}
        assert json.loads(client.get("/v1/models").text)["data"][0]["id"] == "seq-cls"
