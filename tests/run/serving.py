"""What the server's tests share: adapters of which each says something of its own, sinks, and servers as processes."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import python_path

ADAPTERS = ("one", "two", "three")


def make_adapter(model: Path | str, folder: Path, seed: int, rank: int = 4) -> Path:
    from transformers import AutoModelForCausalLM

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = get_peft_model(base, settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    return folder


def make_adapters(model: Path, folder: Path, names: tuple[str, ...] = ADAPTERS) -> dict[str, Path]:
    return {name: make_adapter(model, folder / name, seed, 2 + 2 * (seed % 3)) for seed, name in enumerate(names)}


class Collect:
    """A request's sink."""

    def __init__(self) -> None:
        self.tokens, self.text, self.finish, self.error = [], "", None, None
        self.done = threading.Event()

    def __call__(self, piece) -> None:
        self.tokens += [chosen.token for chosen in piece.tokens]
        self.text += piece.text
        self.finish, self.error = piece.finish, piece.error
        if piece.finish or piece.error:
            self.done.set()


def finish(engine, sinks, timeout: float = 20) -> bool:
    """Wait for answers, then close the engine; whether all came."""
    came = sum(sink.done.wait(timeout) for sink in sinks) == len(sinks)
    return engine.close(timeout) and came


# -- processes ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`peft serve` on loopback. Used as a context, it is gone at the end."""

    def __init__(self, base, adapters: dict[str, Path], *options, wait: bool = True) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
        command = [sys.executable, "-m", "peft_run", "serve", "--base", str(base), *given]
        command += ["--port", str(self.port), "--dtype", "fp32", "--offline", *map(str, options)]
        environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        if wait:
            self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def wait(self, seconds: float = 240):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                pytest.fail(self.process.stderr.read())
            try:
                return self.get("/health")
            except OSError:
                time.sleep(0.05)
        pytest.fail("never ready")

    def get(self, path, **headers):
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    def post(self, path, body, **headers):
        """The answer as JSON. Raises HTTPError."""
        headers = {"content-type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def send(self, method, path, body=None, **headers):
        """(status, text, headers), whatever the status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()

    def metric(self, name):
        lines = [line.split() for line in self.get("/metrics").splitlines()]
        return next((float(line[1]) for line in lines if line[0] == f"peft_{name}"), 0.0)

    def until(self, condition, seconds: float = 60) -> bool:
        """Whether it came true in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.02)
        return condition()

    def resident(self) -> int:
        """Bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))
