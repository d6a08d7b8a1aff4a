"""`peft serve` as a process on loopback: the official client, a client that goes away, a polite end, and kill -9."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import python_path
from serving import ADAPTERS, make_adapters

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.slow  # each test waits for a process that imports everything


class Server:
    def __init__(self, tiny, folder, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        adapters = [part for name in ADAPTERS for part in ("--adapter", f"{name}={folder / name}")]
        command = [sys.executable, "-m", "peft_run", "serve", "--base", str(tiny), *adapters]
        command += ["--port", str(self.port), "--dtype", "fp32", "--offline", *map(str, options)]
        environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.wait()

    def wait(self):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self.process.poll() is not None:
                pytest.fail(self.process.stderr.read())
            try:
                return self.get("/health")
            except OSError:
                time.sleep(0.1)
        pytest.fail("never ready")

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name):
        lines = [line.split() for line in self.get("/metrics").splitlines()]
        return next((float(line[1]) for line in lines if line[0] == f"peft_{name}"), 0.0)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    make_adapters(tiny, root)
    return root


@pytest.fixture
def serve(tiny, folder):
    servers = []

    def start(*options):
        servers.append(Server(tiny, folder, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def long_chat(**more):
    return {"model": "one", "messages": [{"role": "user", "content": "hi"}], "stop": [], "max_tokens": 1500, **more}


def test_a_client_that_leaves_frees_its_slot_and_a_polite_end_lets_answers_finish(serve):
    server = serve("--max-tokens", 2000)
    for stream in (True, False):
        body = json.dumps(long_chat(stream=stream, n=4)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until = time.monotonic() + 20
            while not server.metric("requests_running") and time.monotonic() < until:
                time.sleep(0.02)
        until = time.monotonic() + 20
        while server.metric("requests_running") and time.monotonic() < until:
            time.sleep(0.05)
        assert server.metric("requests_running") == 0
    assert server.metric("requests_cancelled_total") >= 1

    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps({"model": "two", "prompt": "a", "max_tokens": 300, "stream": True}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.readline()
        server.process.send_signal(signal.SIGTERM)
        assert answer.read().decode().endswith("data: [DONE]\n\n")
    assert server.process.wait(40) in (0, -signal.SIGTERM)


def test_after_kill_9_the_same_adapters_are_there(serve, folder, tmp_path):
    options = ("--allow-runtime-lora", folder, "--state", tmp_path / "state.json")
    server = serve(*options)
    server.post("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "two"})
    models = [m["id"] for m in json.loads(server.get("/v1/models"))["data"]]
    answer = server.post("/v1/completions", {"model": "late", "prompt": "a", "temperature": 0})
    server.process.kill()
    server.process.wait()
    again = serve(*options)
    assert [m["id"] for m in json.loads(again.get("/v1/models"))["data"]] == models
    text = json.loads(again.post("/v1/completions", {"model": "late", "prompt": "a", "temperature": 0}))
    assert text["choices"] == json.loads(answer)["choices"]


def test_the_official_client(serve):
    openai = pytest.importorskip("openai")
    server = serve("--api-key", "k")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny", *ADAPTERS]
    messages = [{"role": "user", "content": "hi"}]
    settings = {"model": "one", "messages": messages, "temperature": 0, "max_tokens": 10}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=1)
    parts = client.chat.completions.create(**settings, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content and len(whole.choices[0].logprobs.content) <= 10
    assert client.completions.create(model="two", prompt="abc", max_tokens=3).choices[0].text is not None
    assert len(client.embeddings.create(model="tiny", input="abc").data[0].embedding) == 32
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**settings, "model": "none"})
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**settings, n=100)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).models.list()


def test_other_hosts_need_a_key_and_options_are_checked(peft, tiny):
    open_to_all = peft("serve", "--base", tiny, "--host", "0.0.0.0", PEFT_API_KEY="")
    assert open_to_all.returncode == 2 and "--api-key" in open_to_all.stderr
    assert peft("serve").returncode == 2
    assert peft("serve", "--base", tiny, "--adapter", "nonsense").returncode == 2
    missing = peft("serve", "--base", tiny, "--adapter", f"x={tiny}")
    assert missing.returncode == 1 and "adapter_config.json" in missing.stderr
