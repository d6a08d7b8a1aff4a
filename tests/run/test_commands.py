"""The command line: exit codes, one-line errors in both languages, and no connection to anywhere."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import string
from pathlib import Path

import pytest

from peft_run import cli, messages
from peft_run.errors import DoesNotFit, Interrupted, QualityError


def test_every_message_is_there_in_both_languages_with_the_same_places_to_fill():
    for module in pkgutil.iter_modules(messages.__path__):
        for key, texts in importlib.import_module(f"peft_run.messages.{module.name}").TABLE.items():
            assert key.startswith(f"{module.name}."), key
            assert tuple(texts) == messages.LANGUAGES, key
            fields = [{f for _, f, _, _ in string.Formatter().parse(text) if f} for text in texts.values()]
            assert fields[0] == fields[1], key


def test_every_command_is_documented_in_both_languages(capsys):
    table = cli.table()
    assert {"train", "data", "config", "init", "recipes", "report", "demo", "methods"} <= set(table)
    for language in messages.LANGUAGES:
        cli.main(["--lang", language])
        shown = capsys.readouterr().out
        assert all(module.HELP[language] in shown for module in table.values())


@pytest.mark.parametrize("name", ["sft", "preprocess"])
def test_names_from_other_tools_work_and_are_not_listed(name, capsys):
    assert cli.find(name, cli.table()) not in (None, name)
    cli.main([])
    assert f"  {name} " not in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(DoesNotFit, 4), (QualityError, 5), (Interrupted, 130)])
def test_errors_have_the_documented_exit_codes(error, code):
    assert cli.exit_code(error("x")) == code


@pytest.fixture
def project(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"t {n}", "label": "x" if n % 2 else "y"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"task: seq_cls\nmodel: {{path: {json.dumps(str(tiny))}, dtype: fp32}}\n"
        "data: {train: data.jsonl}\ntrain: {steps: 1}\n"
    )
    return tmp_path


def put(project, name, content):
    path = project / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


BROKEN = {  # what the user does -> arguments, exit code, and a word of the message
    "no recipe": (["nothing.yaml"], 2, "nothing.yaml"),
    "no arguments": ([], 2, "peft train recipe.yaml"),
    "unknown key": (["r.yaml", "train.lrr=1"], 2, "train.lr"),
    "no override": (["r.yaml", "train.lr"], 2, "section.key=value"),
    "wrong value": (["r.yaml", "train.epochs=many"], 2, "train.epochs"),
    "no data": (["r.yaml", "data.train=gone.csv"], 2, "gone.csv"),
    "unknown kind of file": (["r.yaml", "data.train=a.doc"], 2, "a.doc"),
    "binary file": (["r.yaml", "data.train=binary.csv"], 2, "binary.csv"),
    "wrong encoding": (["r.yaml", "data.train=latin.csv"], 2, "UTF-8"),
    "empty file": (["r.yaml", "data.train=empty.csv"], 2, "empty.csv"),
    "header only": (["r.yaml", "data.train=header.csv"], 2, "header.csv"),
    "broken json": (["r.yaml", "data.train=broken.jsonl"], 2, "line 2"),
    "not objects": (["r.yaml", "data.train=numbers.json"], 2, "list of objects"),
    "unknown columns": (["r.yaml", "data.train=columns.csv"], 2, "foo, bar"),
    "empty labels": (["r.yaml", "data.train=nolabel.csv"], 2, "row 2"),
    "one label": (["r.yaml", "data.train=onelabel.csv"], 2, "tell apart"),
    "too many cells": (["r.yaml", "data.train=ragged.csv"], 2, "line 3"),
    "data of another task": (["r.yaml", "data.train=chat.jsonl"], 2, "alpaca"),
    "too long": (["r.yaml", "data.max_length=8", "data.overlong=drop", "data.train=long.csv"], 2, "max_length"),
    "unknown method": (["r.yaml", "adapter.method=lorra"], 2, "lora"),
    "method without the field": (["r.yaml", "adapter.method=ia3", "adapter.r=4"], 2, "adapter.r"),
    "unknown option": (["r.yaml", "adapter.options.use_drora=true"], 2, "use_dora"),
    "wrong option": (["r.yaml", "adapter.options.lora_alpha=-x"], 2, "lora_alpha"),
    "no such layer": (["r.yaml", "adapter.target=[nowhere]"], 2, "nowhere"),
    "no model": (["r.yaml", "model.path=./none"], 2, "./none"),
    "empty model folder": (["r.yaml", "model.path=hollow"], 2, "config.json"),
    "broken model": (["r.yaml", "model.path=torn"], 2, "torn"),
    "model of the hub": (["r.yaml", "model.path=org/none", "--offline"], 2, "org/none"),
    "no device": (["r.yaml", "model.device=cuda:77"], 2, "cuda:77"),
    "fp16 on a cpu": (["r.yaml", "model.dtype=fp16", "model.device=cpu"], 2, "fp16"),
    "no template": (["r.yaml", "data.template=none.jinja"], 2, "none.jinja"),
    "too hot": (["r.yaml", "train.lr=1e30", "train.steps=20", "train.clip=0", "train.warmup=0"], 1, "not finite"),
    "no run": (["--resume", "nowhere"], 2, "nowhere"),
    "output is a file": (["r.yaml", "output.dir=data.jsonl"], 1, "data.jsonl"),
}


@pytest.fixture
def broken(project):
    put(project, "binary.csv", bytes(range(256)) * 4)
    put(project, "latin.csv", "text,label\ncafé au lait,1\n".encode("latin-1"))
    put(project, "empty.csv", "")
    put(project, "header.csv", "text,label\n")
    put(project, "broken.jsonl", '{"text": "a", "label": "b"}\n{"text": \n')
    put(project, "numbers.json", "[1, 2, 3]")
    put(project, "columns.csv", "foo,bar\n1,2\n")
    put(project, "nolabel.csv", "text,label\na,x\nb,\nc,y\n")
    put(project, "onelabel.csv", "text,label\na,x\nb,x\nc,x\n")
    put(project, "ragged.csv", "text,label\na,x\nb,c,y\n")
    put(project, "a.doc", "x")
    put(project, "chat.jsonl", '{"instruction": "a", "output": "b"}\n')
    put(project, "long.csv", "text,label\n" + "".join(f"{'word ' * 9}{n},{n % 2}\n" for n in range(6)))
    (project / "hollow").mkdir()
    (project / "torn").mkdir()
    put(project, "torn/config.json", "{")
    return project


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_ends_in_one_line_and_the_documented_code(broken, case, capsys, monkeypatch):
    arguments, code, word = BROKEN[case]
    if "--offline" in arguments:  # in this process the audit hook would stay; the hub's own switch is set already
        arguments = [a for a in arguments if a != "--offline"]
    before = set(os.listdir(broken))
    assert cli.main(["train", *arguments, "--quiet"]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft train: error")]
    assert len(error) == 1 and word in error[0], error
    assert set(os.listdir(broken)) - before <= {"runs"}
    leftovers = [p for p in (broken / "runs").rglob("*") if p.name.startswith("adapter_") or p.name == "artefact.json"]
    assert not leftovers
    assert cli.main(["train", *arguments, "--quiet", "--lang", "zh"]) == code
    assert "peft train：错误：" in capsys.readouterr().err


def test_offline_opens_no_connection_and_says_what_it_would_have_needed(project, peft, monkeypatch):
    (project / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        open('sockets.txt', 'a').write(f'{event} {arguments}\\n')\n"
        "sys.addaudithook(watch)\n"
    )
    path = os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
    done = peft("train", "r.yaml", "--offline", "--json", cwd=project, PYTHONPATH=path, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert not (project / "sockets.txt").exists()


def test_offline_stops_what_forgets_to_ask(peft, project):
    script = (
        "import socket\nfrom peft_run.offline import go_offline\ngo_offline()\n"
        "socket.create_server(('127.0.0.1', 0)).close()\n"
        "try: socket.create_connection(('192.0.2.1', 80), timeout=1)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    import subprocess
    import sys

    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert shown.startswith("UsageError --offline forbids connecting to 192.0.2.1")


def test_data_shows_labels_lengths_and_what_is_learnt(project, tiny, capsys):
    assert cli.main(["data", "data.jsonl", "--model", str(tiny), "--task", "causal_lm"]) == 0
    shown = capsys.readouterr().out
    assert "classification (text <- text, label <- label)" in shown
    assert "⟦y<end>⟧" in shown
    assert cli.main(["data", "data.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"]["train"] == {"y": 6, "x": 6} and found["task"] == "seq_cls"


def test_init_gives_a_project_that_trains(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "zh-sentiment", "mine", "--quiet"]) == 0
    override = [f"model.path={tiny}", "model.dtype=fp32", "train.steps=2", "--quiet", "--json"]
    assert cli.main(["train", "mine/head.yaml", *override]) == 0
    result = json.loads(capsys.readouterr().out)
    assert os.path.isfile(os.path.join(result["run"], "adapter_model.safetensors"))
    report = Path(result["run"], "report.html").read_text(encoding="utf-8")
    assert "<svg" in report and "http" not in report.replace("http://www.w3.org/2000/svg", "")
    assert cli.main(["train", "mine/head.yaml", *override, "--dry-run"]) == 0


def test_free_options_change_the_recipe(project, capsys):
    arguments = ["r.yaml", "--lora-rank", "4", "--train.lr=1e-3", "--quiet", "--json"]
    assert cli.main(["train", *arguments]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    config = json.loads(Path(run, "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
