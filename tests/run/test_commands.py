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
from peft_run.options import divide, split_overrides


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


@pytest.mark.parametrize(
    "words",
    [
        ["--lora-rank", "4", "r.yaml", "train.lr=1e-3"],
        ["--data.packing", "r.yaml", "--lora-rank=4", "train.lr=1e-3"],
        ["-q", "train.lr=1e-3", "--output-dir", "out", "-c", "r.yaml", "--lora_rank", "4", "--json"],
        ["r.yaml", "--json", "train.lr=1e-3", "-q", "--lora-rank", "4"],
    ],
)
def test_options_may_stand_anywhere(words):
    parser = cli.Parser(prog="peft train")
    command = cli.table()["train"]
    command.add_arguments(parser)
    cli.add_common_arguments(parser, "en")
    own, free = divide(words, parser)
    args = parser.parse_intermixed_args(own)
    args.free = free
    recipe = recipe_fields(split_overrides(args))
    assert args.recipe == "r.yaml" and recipe["lora_rank"] == "4" and recipe["train.lr"] == "1e-3"


def recipe_fields(overrides):
    return {name.replace("-", "_"): value for name, _, value in (text.partition("=") for text in overrides)}


def test_switches_may_stand_before_the_command():
    assert cli.command_first(["--json", "--lang", "zh", "-q", "data", "x.csv"]) == [
        *("--lang", "zh", "data", "--json", "-q", "x.csv")
    ]
    assert cli.command_first(["--version"]) == ["--version"]
