"""Pushing to and pulling from a local server that speaks the hub's wire format."""

from __future__ import annotations

import json
import os

import hub_server
import models
import pytest
import torch
from helpers import FIXTURES, python
from safetensors.torch import load, load_file


def client(hub, task, folder, **changes):
    """Run a task of hub_client.py against the server."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **changes,
    }
    return python(str(FIXTURES / "hub_client.py"), task, str(folder), env={**os.environ, **settings})


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A server after an adapter was pushed to it, and the outputs of that adapter."""
    hub = hub_server.Hub()
    folder = tmp_path_factory.mktemp("push")
    client(hub, "push", folder)
    yield hub, load_file(folder / "push.safetensors")
    hub.close()


def test_push_uploads_adapter_config_and_card(pushed):
    hub, _ = pushed
    files = hub.repos["user/adapter"]["main"]
    assert set(files) >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert not any(name.startswith(("model", "pytorch_model")) for name in files)
    tensors = load(files["adapter_model.safetensors"])
    assert len(tensors) == 9
    assert tensors["base_model.model.lm_head.weight"].shape == (models.VOCAB, models.WIDTH)
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert files["README.md"].startswith(b"---")
    assert hub.private == {"user/secret"}
    assert set(hub.repos["user/adapter"]) == {"main", "branch"}
    branch = hub.repos["user/adapter"]["branch"]["adapter_model.safetensors"]
    assert branch != files["adapter_model.safetensors"]
    assert set(hub.repos["user/config-only"]["main"]) - {"README.md"} == {"adapter_config.json"}


def test_pull_gives_the_pushed_outputs(pushed, tmp_path):
    hub, wanted = pushed
    files = hub.repos["user/adapter"]["main"]
    hub.add("user/nested", {f"deep/{name}": content for name, content in files.items()})
    models.build("llama").save_pretrained(tmp_path / "base")
    hub.add("user/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "user/base"}
    hub.add("user/whole", {**files, "adapter_config.json": json.dumps(config).encode()})

    client(hub, "pull", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == ["LoraConfig", 8, ["q_proj", "v_proj"]]
    found = load_file(tmp_path / "pull.safetensors")
    same = {"branch": "branch", "loaded": "branch"}
    assert set(found) == {"output", "branch", "secret", "explicit", "subfolder", "auto", "loaded"}
    for name, value in found.items():
        expected = wanted[same.get(name, "output")]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert (wanted["output"] - wanted["branch"]).abs().max() > 1e-3
    assert (wanted["output"] - models.run(models.build("llama"), "llama")).abs().max() > 1e-3


def test_errors_name_the_repository(pushed, tmp_path):
    hub, _ = pushed
    hub.add("user/empty", {"README.md": b"nothing here"})
    client(hub, "fail", tmp_path)
    messages = json.loads((tmp_path / "messages.json").read_text())
    assert set(messages) == {"absent", "secret", "revision", "empty"}
    for name, repo in [("absent", "absent"), ("secret", "secret"), ("revision", "adapter"), ("empty", "empty")]:
        kind, text = messages[name]
        assert kind == "ValueError", (name, kind, text)
        assert f"user/{repo}" in text


def test_push_without_a_token_fails(tmp_path):
    hub = hub_server.Hub()
    with pytest.raises(AssertionError, match=r"401 (Client Error|Unauthorized)"):
        client(hub, "push", tmp_path, HF_TOKEN="hf_wrong")
    assert "POST /api/repos/create" in hub.log
    assert hub.repos == {}
    hub.close()


def test_offline_reads_the_cache_and_asks_nothing(pushed, tmp_path):
    hub, wanted = pushed
    for offline in ("0", "1"):
        before = len(hub.log)
        client(hub, "cached", tmp_path, HF_HUB_OFFLINE=offline)
        found = load_file(tmp_path / "cached.safetensors")["output"]
        torch.testing.assert_close(found, wanted["output"], atol=1e-6, rtol=1e-6)
        assert (len(hub.log) == before) == (offline == "1")
