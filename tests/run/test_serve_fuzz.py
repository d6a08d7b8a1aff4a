"""Generated requests, valid and invalid, against every route of the OpenAPI document: no 5xx, no hang."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ADAPTERS, Server, make_adapters

pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")

CHECKS = "not_a_server_error,negative_data_rejection"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    make_adapters(tiny, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("examples", [10, 250])
def test_no_request_breaks_the_server(tiny, folder, examples, tmp_path):
    """examples: of each route and mode; 250 make more than 3,000 requests."""
    adapters = {name: folder / name for name in ADAPTERS}
    options = ("--max-tokens", 64, "--queue", 256, "--allow-runtime-lora", folder, "--api-key", "k")
    with Server(tiny, adapters, *options) as server:
        document = json.loads(server.get("/openapi.json", authorization="Bearer k"))
        names = ["tiny", *ADAPTERS]
        for schema in document["components"]["schemas"].values():  # most valid requests should get past the name
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"type": "string", "enum": names}
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(tmp_path / "openapi.json")]
        command += ["--url", server.url, "-H", "Authorization: Bearer k", "--mode", "all", "--checks", CHECKS]
        command += ["--max-examples", str(examples), "--request-timeout", "20", "--seed", "1", "--continue-on-failure"]
        command += ["--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color"]
        environment = {**os.environ, "PYTHONPATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        (tmp_path / "said.txt").write_text(done.stdout + done.stderr)
        found = done.stdout.partition("= FAILURES")[2] or done.stdout + done.stderr
        assert done.returncode == 0, found[:4000]
        asked = sum(int(n) for n in re.findall(r"peft_responses_total\{status=\"\d+\"\} (\d+)", metrics(server)))
        assert asked > (3000 if examples > 100 else 200)
        assert server.post("/v1/completions", {"model": "one", "prompt": "a"}, authorization="Bearer k")["choices"]
        assert "engine_errors" not in metrics(server)


def metrics(server):
    return server.get("/metrics", authorization="Bearer k")
