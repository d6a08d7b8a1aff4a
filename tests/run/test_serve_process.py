"""`peft serve` as a process on loopback: clients that go away, a polite end, kill -9, and the options."""

import json
import signal
import socket
import threading
import time
import urllib.request

import pytest
from serving import ADAPTERS, Server, make_adapter, make_adapters

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    make_adapters(tiny, root)
    return root


@pytest.fixture
def serve(tiny, folder):
    servers = []

    def start(*options):
        servers.append(Server(tiny, {name: folder / name for name in ADAPTERS}, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def long_chat(**more):
    return {"model": "one", "messages": [{"role": "user", "content": "hi"}], "stop": [], "max_tokens": 1500, **more}


def connect_and_ask(server, path, body):
    """A connection that has asked and reads nothing."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def idle(server):
    return server.metric("requests_running") == server.metric("requests_waiting") == 0


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_slot_and_a_polite_end_lets_answers_finish(serve):
    server = serve("--max-tokens", 2000)
    for stream in (True, False):
        cancelled = server.metric("requests_cancelled_total")
        with connect_and_ask(server, "/v1/chat/completions", long_chat(stream=stream, n=4)):
            assert server.until(lambda: server.metric("requests_running"))
        assert server.until(lambda: idle(server))
        assert server.metric("requests_cancelled_total") > cancelled

    body = json.dumps({"model": "two", "prompt": "a", "max_tokens": 300, "stream": True}).encode()
    request = urllib.request.Request(server.url + "/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.readline()
        server.process.send_signal(signal.SIGTERM)
        assert answer.read().decode().endswith("data: [DONE]\n\n")
    assert server.process.wait(40) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_five_hundred_clients_that_leave_cost_nothing(serve):
    server = serve("--max-tokens", 2000, "--queue", 16, "--slots", 4)
    for _ in range(20):
        connect_and_ask(server, "/v1/chat/completions", long_chat(stream=True)).close()
    assert server.until(lambda: idle(server))
    before = server.open_files(), server.threads()
    for i in range(500):
        connection = connect_and_ask(server, "/v1/chat/completions", long_chat(stream=bool(i % 2)))
        if i % 3 == 0:
            connection.recv(100)
        connection.close()
    assert server.until(lambda: idle(server))
    assert server.until(lambda: server.open_files() <= before[0] + 1 and server.threads() <= before[1] + 8)
    assert server.post("/v1/completions", {"model": "one", "prompt": "a", "max_tokens": 3})["choices"]


@pytest.mark.slow
def test_under_ten_times_the_load_some_wait_some_are_told_to_and_all_that_are_taken_finish(serve):
    server = serve("--slots", 2, "--queue", 4)
    found = []

    def ask():
        body = json.dumps({"model": "one", "prompt": "abc", "max_tokens": 200, "temperature": 0}).encode()
        found.append(server.send("POST", "/v1/completions", body, **{"content-type": "application/json"}))

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    texts = {json.loads(text)["choices"][0]["text"] for status, text, _ in found if status == 200}
    assert len(texts) == 1
    for status, text, headers in found:
        if status == 429:
            assert int(headers["retry-after"]) > 0 and json.loads(text)["error"]["code"] == "queue_full"
    assert server.until(lambda: idle(server))


@pytest.mark.slow
def test_after_each_kill_9_under_load_the_same_adapters_are_there(serve, folder, tiny, tmp_path):
    options = ("--allow-runtime-lora", folder, "--state", tmp_path / "state.json")
    server = serve(*options)
    server.post("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "two"})
    models = [m["id"] for m in json.loads(server.get("/v1/models"))["data"]]
    asked = {"model": "late", "prompt": "a", "temperature": 0}
    wanted = server.post("/v1/completions", asked)["choices"]
    for number in range(4):
        busy = [connect_and_ask(server, "/v1/chat/completions", long_chat(stream=True)) for _ in range(4)]
        if number % 2:  # in the middle of loading
            busy.append(
                connect_and_ask(
                    server, "/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "two", "load_inplace": True}
                )
            )
        time.sleep(0.05 * number)
        server.kill()
        for connection in busy:
            connection.close()
        server = serve(*options)
        assert [m["id"] for m in json.loads(server.get("/v1/models"))["data"]] == models
        assert server.post("/v1/completions", asked)["choices"] == wanted


@pytest.mark.slow
def test_a_replaced_adapter_never_gives_an_old_answer(serve, folder, tiny):
    """A long prompt, so that a prefix of the old weights would be found if it could be."""
    server = serve("--allow-runtime-lora", folder, "--max-tokens", 400)
    for name, seed in (("left", 41), ("right", 42)):
        make_adapter(tiny, folder / name, seed)
    asked = {"model": "hot", "prompt": "a long beginning " * 12, "temperature": 0, "max_tokens": 12}
    load = {"lora_name": "hot", "load_inplace": True}
    wanted = {}
    for name in ("left", "right"):
        server.post("/v1/load_lora_adapter", {**load, "lora_path": name})
        wanted[name] = server.post("/v1/completions", asked)["choices"]
    assert wanted["left"] != wanted["right"]
    stop, odd = threading.Event(), []

    def traffic():
        while not stop.is_set():
            if (found := server.post("/v1/completions", asked)["choices"]) not in wanted.values():
                odd.append(found)

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(100):
        name = ("left", "right")[i % 2]
        server.post("/v1/load_lora_adapter", {**load, "lora_path": name})
        assert server.post("/v1/completions", asked)["choices"] == wanted[name], i
    stop.set()
    for thread in threads:
        thread.join()
    assert not odd and server.metric("prefix_tokens_total") > 0


@pytest.mark.slow
def test_the_official_client(serve):
    openai = pytest.importorskip("openai")
    server = serve("--api-key", "k")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny", *ADAPTERS]
    assert client.models.retrieve("one").id == client.models.retrieve("tiny:one").id == "one"
    messages = [{"role": "user", "content": "hi"}]
    settings = {"model": "one", "messages": messages, "temperature": 0, "max_tokens": 10}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=1)
    parts = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content and len(whole.choices[0].logprobs.content) <= 10
    assert parts[-1].usage == whole.usage
    plain = {"model": "two", "prompt": "abc", "max_tokens": 3, "temperature": 0}
    found = client.completions.create(**plain).choices[0].text
    assert found == "".join(part.choices[0].text for part in client.completions.create(**plain, stream=True))
    assert len(client.embeddings.create(model="tiny", input="abc").data[0].embedding) == 32
    assert len(client.embeddings.create(model="one", input=["abc", "d"], encoding_format="float").data) == 2
    for change, error, param in (
        ({"model": "none"}, openai.NotFoundError, "model"),
        ({"n": 100}, openai.BadRequestError, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"max_tokens": 10**6}, openai.BadRequestError, None),
    ):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{**settings, **change})
        assert param is None or caught.value.param == param
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).models.list()


def test_other_hosts_need_a_key(peft, tiny):
    open_to_all = peft("serve", "--base", tiny, "--host", "0.0.0.0", PEFT_API_KEY="")
    assert open_to_all.returncode == 2 and "--api-key" in open_to_all.stderr


@pytest.mark.slow
def test_options_are_checked(peft, tiny):
    assert peft("serve").returncode == 2
    assert peft("serve", "--base", tiny, "--adapter", "nonsense").returncode == 2
    assert peft("serve", "--base", tiny, "--slots", "0").returncode == 2
    missing = peft("serve", "--base", tiny, "--adapter", f"x={tiny}")
    assert missing.returncode == 1 and "adapter_config.json" in missing.stderr
