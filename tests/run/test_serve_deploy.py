"""The files in deploy/: nginx in front of two servers on loopback, and vLLM's command for several exports."""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest
from conftest import ROOT
from serving import Server, free_port, make_adapters

NAMES = tuple("abcdefgh")


@pytest.fixture
def behind_nginx(tiny, tmp_path):
    """(ask, servers, address of the proxy), with deploy/nginx as it is but for the ports."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    adapters = make_adapters(tiny, tmp_path / "adapters", NAMES)
    servers = [Server(tiny, adapters) for _ in range(2)]
    port = free_port()
    shutil.copytree(ROOT / "deploy" / "nginx", tmp_path / "nginx")
    config = tmp_path / "nginx" / "nginx.conf"
    text = config.read_text().replace("listen 127.0.0.1:8000", f"listen 127.0.0.1:{port}")
    for old, server in zip((8001, 8002), servers):
        text = text.replace(f"server 127.0.0.1:{old} ", f"server 127.0.0.1:{server.port} ")
    config.write_text(text)
    prefix = tmp_path / "work"
    prefix.mkdir()
    command = [nginx, "-p", str(prefix), "-e", "stderr", "-c", str(config), "-g", "daemon off; master_process off;"]
    process = subprocess.Popen(command)

    def ask(path, body=None, **headers):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode(), answer.headers.get("x-served-by")

    try:
        assert servers[0].until(lambda: answers(ask))
        yield ask, servers
    finally:
        process.terminate()
        process.wait()
        for server in servers:
            server.kill()


def answers(ask):
    try:
        return ask("/health")[0]
    except OSError:
        return None


@pytest.mark.slow
def test_an_adapters_requests_reach_one_server_and_its_loss_is_not_noticed(behind_nginx):
    ask, servers = behind_nginx

    def home(name):
        """Where the adapter is answered by its path, and by the header."""
        body = {"model": name, "prompt": "ab", "max_tokens": 4, "temperature": 0}
        text, by_path = ask(f"/adapters/{name}/v1/completions", body)
        _, by_header = ask("/v1/completions", body, **{"x-adapter": name})
        return json.loads(text)["choices"], by_path.split(", ")[-1], by_header.split(", ")[-1]

    first = {name: home(name) for name in NAMES}
    assert all(by_path == by_header for _, by_path, by_header in first.values())
    assert {by_path for _, by_path, _ in first.values()} == {f"127.0.0.1:{server.port}" for server in servers}
    assert {name: home(name) for name in NAMES} == first
    alone = servers[0].post("/v1/completions", {"model": "a", "prompt": "ab", "max_tokens": 4, "temperature": 0})
    assert first["a"][0] == alone["choices"]

    text, _ = ask("/adapters/a/v1/completions", {"model": "a", "prompt": "ab", "max_tokens": 30, "stream": True})
    assert text.endswith("data: [DONE]\n\n")
    for path in ("/v1/load_lora_adapter", "/adapters/a/v1/unload_lora_adapter", "/metrics"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            ask(path, {})

    servers[0].kill()
    again = {name: home(name) for name in NAMES}
    assert {name: found[0] for name, found in again.items()} == {name: found[0] for name, found in first.items()}
    assert {found[1] for found in again.values()} == {f"127.0.0.1:{servers[1].port}"}


def test_vllms_command_has_every_export(tmp_path):
    for name, rank in (("poem", 8), ("news", 64)):
        folder = tmp_path / f"to vllm {name}"
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
        (folder / "serve.sh").write_text(
            f"exec vllm serve base --enable-lora --max-lora-rank {rank} --lora-modules x\n"
        )
    (tmp_path / "merged").mkdir()

    def run(*folders):
        command = [ROOT / "deploy" / "vllm" / "serve.sh", "org/base", *folders, "--", "--port", "9"]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM": "echo"})

    folders = [tmp_path / "to vllm poem", tmp_path / "to vllm news"]
    said = run(*folders).stdout.strip()
    modules = f"poem={folders[0]}/poem news={folders[1]}/news"
    assert said == f"serve org/base --enable-lora --max-lora-rank 64 --lora-modules {modules} --port 9"
    refused = run(tmp_path / "merged")
    assert refused.returncode == 2 and "no adapter" in refused.stderr
