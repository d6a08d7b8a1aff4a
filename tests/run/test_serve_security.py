"""What hostile clients and hostile adapter folders get: an answer in OpenAI's shape, and nothing else.

Templates, paths, addresses and shell text (D6 to D9 of the reliability bench); what keeps a server busy for nothing and
who may ask (E6, E7). Fuzzing is in test_serve_fuzz.py, processes are in test_serve_process.py.
"""

import asyncio
import json
import os
import shutil
import socket
import string

import pytest
from serving import Server, make_adapter, make_adapters
from test_serve_api import KEY, chat, make_app, make_service, open_client


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("outer") / "served"
    make_adapters(tiny, root)
    return root


@pytest.fixture
def client(tiny, folder):
    with open_client(make_service(tiny, folder)) as client:
        yield client


def load(client, name, path, **more):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def refused(answer):
    problem = answer.json()["error"]
    return 400 <= answer.status_code < 500 and set(problem) == {"message", "type", "param", "code"}


# -- D6: templates --------------------------------------------------------------------------------------------------

TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 4000000000 }}",
    "{{ 'a'|center(4000000000) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.clear() }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_from_outside_is_never_run(client, folder, tmp_path, template):
    """Neither one in a request nor one that an adapter brings while the server runs."""
    canary = tmp_path / "canary"
    text = template.replace("CANARY", str(canary))
    for field in ("chat_template", "chat_template_kwargs", "tools", "documents"):
        assert refused(client.post("/v1/chat/completions", json=chat(**{field: text})))
    hostile = shutil.copytree(folder / "one", folder / "hostile", dirs_exist_ok=True)
    (hostile / "chat_template.jinja").write_text(text)
    assert load(client, "quiet", "hostile").status_code == 200  # no artefact.json: the file means nothing
    assert client.post("/v1/chat/completions", json=chat("quiet")).json() | {"id": 0, "created": 0, "model": 0} == (
        client.post("/v1/chat/completions", json=chat("one")).json() | {"id": 0, "created": 0, "model": 0}
    )
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "quiet"}).status_code == 200
    (hostile / "artefact.json").write_text(json.dumps({"task": "causal_lm", "template_sha256": "0" * 64}))
    answer = load(client, "loud", "hostile")
    assert refused(answer) and "template" in answer.json()["error"]["message"]
    (hostile / "artefact.json").unlink()
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 10**5,
        '{"stop_ids": "abc"}',
        '{"stop_ids": [1e400]}',
        '{"stop_ids": ' + str(list(range(100))) + "}",
        '{"system": ["x"]}',
        '{"system": "' + "x" * (1 << 17) + '"}',
        '{"task": {"a": 1}}',
        '{"x": "' + "y" * (1 << 20) + '"}',
        '{"task": "seq_cls"}',
        '{"tokenizer_sha256": "0"}',
    ],
)
def test_a_broken_or_foreign_artefact_is_refused(client, folder, text):
    hostile = shutil.copytree(folder / "one", folder / "broken", dirs_exist_ok=True)
    (hostile / "artefact.json").write_text(text)
    assert refused(load(client, "broken", "broken"))
    assert "broken" not in client.service.adapters.known and client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**6},
        {"r": -1},
        {"r": "x"},
        {"target_modules": "(a+)+$" * 20},
        {"target_modules": ["q_proj"]},
        {"layer_replication": [[0, 1]] * 2000},
        {"peft_type": "NONE"},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9},
        {"peft_type": ["LORA"]},
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"}},
        {"modules_to_save": ["lm_head"]},
        {"lora_alpha": float("nan")},
        {"use_dora": True},
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused_and_costs_nothing(client, folder, change):
    hostile = shutil.copytree(folder / "one", folder / "misfit", dirs_exist_ok=True)
    config = json.loads((folder / "one" / "adapter_config.json").read_text())
    (hostile / "adapter_config.json").write_text(json.dumps(config | change))
    before = client.service.adapters.nbytes()
    answer = load(client, "misfit", "misfit")
    if "auto_mapping" in change:  # a field that means nothing here
        assert answer.status_code == 200
        client.post("/v1/unload_lora_adapter", json={"lora_name": "misfit"})
    else:
        assert refused(answer), change
    assert client.service.adapters.nbytes() == before
    import sys

    assert "antigravity" not in sys.modules


# -- D7: paths ------------------------------------------------------------------------------------------------------


def escapes(outside):
    """Ways to say a path, to a folder that holds a good adapter, beside the one that adapters may come from."""
    name, real = outside.name, str(outside)
    ups = ["../" * n for n in range(1, 12)]
    plain = [up + name for up in ups] + [f"{up}{real}" for up in ups] + [f"one/../../{name}", f"./../{name}"]
    dressed = [
        real,
        f"//{real}",
        f"/./{real}",
        f"file://{real}",
        f"~/../..{real}",
        f"..\\{name}",
        f"..%2f{name}",
        f"%2e%2e/{name}",
        f"..%c0%af{name}",
        f"\u2025/{name}",
        f"..\u2215{name}",
        f"\\\\host\\share\\{name}",
        f"C:\\{name}",
        f"../{name}\0",
        f"one\0../{name}",
        "one/\0",
        ".",
        "..",
        "./.",
        "/",
        "",
        " ",
        "one/../..",
        "/proc/self/cwd",
        "/dev/zero",
        "/dev/fd/0",
        "/etc/passwd",
        "$HOME",
        "${PWD}",
        "`pwd`",
        "*",
        "?ne",
        "x" * 255,
        "x/" * 2000,
        "\ud800",
        "\u202e" + name,
        "link",
        "link/.",
        f"link/../{name}",
        "links",
        "missing",
    ]
    return plain + dressed + [f"{text}/" for text in plain[:11]] + [f"one/{text}" for text in plain[1:12]]


AS_JSON = {"content-type": "application/json"}  # without it, every body is refused
NAMES = [
    *("../x", "/etc/x", "a/b", "a\\b", "a b", "a\0", "..", ".", "", " ", "\n", "ä", "\u202ea", "x" * 65, "x" * 5000),
    *("__base__", "tiny", "%2e", "a:b", "$(id)", "`id`", "-", "{name}", "'; --", "con\t", "a\r\nx: y", "\ud800"),
]


def test_no_path_leads_out_and_no_name_is_a_path(client, folder, tiny):
    outside = folder.parent / "beside"
    make_adapter(tiny, outside, seed=3)
    (folder / "link").symlink_to(outside)
    (folder / "links").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "links" / file).symlink_to(outside / file)
    tree = sorted(folder.parent.rglob("*"))
    paths = escapes(outside)
    assert len(paths) + len(NAMES) >= 100
    for path in paths:
        body = json.dumps({"lora_name": "x", "lora_path": path}).encode()
        answer = client.post("/v1/load_lora_adapter", content=body, headers=AS_JSON)
        assert refused(answer), path
    for name in NAMES:
        if name in ("-",):
            continue
        body = json.dumps({"lora_name": name, "lora_path": "one", "load_inplace": True}).encode()
        assert refused(client.post("/v1/load_lora_adapter", content=body, headers=AS_JSON)), name
    assert sorted(folder.parent.rglob("*")) == tree and set(client.service.adapters.known) == {"one", "two", "three"}


# -- D8: addresses, D9: shell ---------------------------------------------------------------------------------------


def test_the_server_fetches_nothing_that_a_request_names(client):
    with socket.create_server(("127.0.0.1", 0)) as canary:
        port = canary.getsockname()[1]
        canary.settimeout(0.2)
        addresses = [
            f"http://127.0.0.1:{port}/x",
            f"http://0x7f.1:{port}/x",
            f"http://[::ffff:127.0.0.1]:{port}/x",
            f"http://2130706433:{port}/",
            f"http:\\\\127.0.0.1:{port}\\x",
            f"http://localhost:{port}#@example.org/",
            f"//127.0.0.1:{port}/x",
            "file:///etc/passwd",
            f"gopher://127.0.0.1:{port}/",
        ]
        for address in addresses:
            assert refused(load(client, "x", address)), address
            image = [{"type": "image_url", "image_url": {"url": address}}]
            asked = chat(messages=[{"role": "user", "content": image}])
            assert refused(client.post("/v1/chat/completions", json=asked))
            assert client.post("/v1/chat/completions", json=chat(text=address)).status_code == 200
            assert refused(client.post("/v1/embeddings", json={"model": address, "input": "x"}))
        with pytest.raises(TimeoutError):
            canary.accept()


def test_text_is_text_in_every_field(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["$(touch canary)", "`touch canary`", "; touch canary", "| touch canary #", "&& touch canary", "--help"]
    texts += [
        "\n touch canary",
        "%s%n",
        "${HOME}",
        "{{7*7}}",
        "{0.__class__}",
        "'\";--",
        "\\x00",
        "a" + string.punctuation,
    ]
    for text in texts:
        for body, path in (
            (chat(text=text, max_tokens=1), "/v1/chat/completions"),
            (chat(stop=[text[:200]], user=text, max_tokens=1), "/v1/chat/completions"),
            ({"model": "one", "prompt": text, "max_tokens": 1}, "/v1/completions"),
            ({"model": "one", "input": text}, "/v1/embeddings"),
        ):
            assert client.post(path, json=body).status_code == 200, (path, text)
        answer = client.post("/v1/chat/completions", json=chat(model=text))
        assert answer.status_code == 404 and text in answer.json()["error"]["message"]
        assert refused(load(client, text, text))
        assert client.service.tokens_of(text) == client.service.tokenizer(text)["input_ids"]
    assert os.listdir(tmp_path) == []


# -- E6: busy for nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"n": 17},
        {"n": 10**9},
        {"n": -1},
        {"max_tokens": 10**9},
        {"max_tokens": -(2**63)},
        {"top_logprobs": -1, "logprobs": True},
        {"top_logprobs": 10**9, "logprobs": True},
        {"stop": ["x"] * 10**5},
        {"stop": ["x" * 10**6]},
        {"seed": 2**63},
        {"seed": -(2**70)},
        {"temperature": 1e308},
        {"top_p": 0},
        {"messages": [{"role": "user", "content": "x"}] * 2000},
        {"logit_bias": {str(i): 1 for i in range(1000)}},
        {"metadata": {"a": "b" * 100}, "messages": []},
        {"best_of": 10**9},
        {"prompt_logprobs": -1},
        {"stream_options": {"include_usage": "maybe"}},
    ],
)
def test_numbers_have_bounds_on_both_sides(client, change):
    answer = client.post("/v1/chat/completions", json=chat(**change))
    assert refused(answer) and answer.status_code != 429  # for what it says, not for the room that it would take


@pytest.mark.slow
def test_floods_are_turned_away_and_others_are_served(tiny, folder):
    server = Server(tiny, {"one": folder / "one"}, "--max-tokens", 200)
    try:
        asked = {"model": "one", "prompt": "a", "max_tokens": 5, "temperature": 0}
        wanted = server.post("/v1/completions", asked)["choices"]
        files, memory = server.open_files(), server.resident()
        waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
        for number, connection in enumerate(waiting):  # half a request line, half the headers
            connection.sendall((b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-a: b")[number % 2])
        assert json.loads(server.get("/health")) == {"status": "ok"}
        assert server.post("/v1/completions", asked)["choices"] == wanted

        with socket.create_connection(("127.0.0.1", server.port)) as big:
            big.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1073741824\r\n\r\n")
            assert b" 413 " in big.recv(100)
        assert sent_until_closed(server, b"x-a: " + b"b" * (10 << 20)) < 1 << 20
        assert (
            sent_until_closed(server, b"transfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * (64 << 20))
            < 32 << 20
        )
        assert server.post("/v1/completions", asked)["choices"] == wanted
        assert server.until(lambda: server.open_files() <= files + 2)  # the halves have been closed
        assert server.resident() < memory + (32 << 20)
        for connection in waiting:
            connection.close()
    finally:
        server.kill()


def sent_until_closed(server, data):
    """How much of a request the server takes, in bytes, before it closes the connection."""
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        try:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
            for at in range(0, len(data), 1 << 16):
                connection.sendall(data[at : at + (1 << 16)])
                sent += 1 << 16
        except OSError:
            return sent
        connection.recv(1000)
    return sent


def test_a_slow_body_is_given_up(tiny, folder, monkeypatch):
    from peft_run.serve import gate

    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    key = f"Bearer {KEY}".encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"authorization", key)]}
    asyncio.run(asyncio.wait_for(make_app(make_service(tiny, folder))(scope, receive, send), 20))
    assert sent[0]["status"] == 408


def test_tokens_beyond_the_vocabulary_are_refused(client):
    for prompt in ([10**6], [1, 2**31 - 1], [-1]):
        asked = {"model": "one", "prompt": prompt, "max_tokens": 2}
        assert refused(client.post("/v1/completions", json=asked)), prompt
        assert refused(client.post("/v1/embeddings", json={"model": "one", "input": prompt}))
