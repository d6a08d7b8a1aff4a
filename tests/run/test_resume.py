"""A run that was killed or stopped goes on, and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from peft_run import cli
from peft_run.config import load
from peft_run.console import silent
from peft_run.errors import Interrupted, RunError, UsageError
from peft_run.run import Run, lock
from peft_run.train import train
from peft_run.train.progress import Progress

STEPS = 40
FILES = (
    "adapter_model.safetensors",
    f"checkpoint-{STEPS}/optimizer.safetensors",
    f"checkpoint-{STEPS}/trained.safetensors",
)


@pytest.fixture
def recipe(tmp_path, tiny):
    """With dropout, accumulation, several epochs, and evaluation: all that could lose its place."""
    rows = [{"instruction": f"Say {n}.", "output": "done" if n % 2 else "no"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"path": str(tiny), "dtype": "fp32"},
        "data": {"train": "data.jsonl"},
        "adapter": {"dropout": 0.1},
        "train": {"steps": STEPS, "batch": 3, "accumulate": 2, "lr": 1e-3, "save_every": 7, "eval_every": 5},
        "output": {"dir": "runs"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*arguments, cwd):
    command = [sys.executable, "-m", "peft_run", "train", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, folder, step):
    """Until the process has logged this step. What an earlier process logged past its checkpoint is cut first."""
    deadline = time.monotonic() + 90
    log = folder / "runs" / "recipe" / "latest" / "trainer_log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if log.exists() and log.stat().st_mtime_ns != before and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.005)
    raise AssertionError("the training does not get there")


def fingerprints(run):
    losses = [(event["step"], event["loss"]) for event in run.events() if "loss" in event]
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in FILES], losses


def test_after_a_kill_and_a_ctrl_c_the_end_is_the_same_to_the_last_bit(recipe, tmp_path, monkeypatch):
    loaded = load(recipe, ["output.name=whole"])
    whole = Run.create(loaded)
    train(whole, loaded)

    process = start(recipe, cwd=tmp_path)
    wait_for_step(process, tmp_path, 17)
    process.kill()
    process.communicate()
    run = Run.open(tmp_path / "runs" / "recipe")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", lambda self, event: event["step"] == 23 and signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(run, run.recipe, resume=True)
    assert run.read_json("status.json")["state"] == "interrupted"
    assert run.checkpoints()[-1].name == "checkpoint-23"
    train(run, run.recipe, resume=True)
    assert fingerprints(run) == fingerprints(whole)


@pytest.mark.slow
def test_the_command_itself_killed_and_stopped(recipe, tmp_path, peft):
    assert peft("train", recipe, "output.name=whole", cwd=tmp_path).returncode == 0
    for step, how, resume in (
        (9, signal.SIGKILL, []),
        (15, signal.SIGKILL, ["--resume"]),
        (22, signal.SIGINT, ["--resume"]),
    ):
        process = start(recipe, *resume, cwd=tmp_path)
        wait_for_step(process, tmp_path, step)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -9), errors
    run = Run.open(tmp_path / "runs" / "recipe")
    last = peft("train", "--resume", run.path, cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert len(list((tmp_path / "runs" / "recipe").glob("2*"))) == 1, "a resume goes on in the same folder"
    assert fingerprints(run) == fingerprints(Run.open(tmp_path / "runs" / "whole"))
    again = peft("train", "--resume", run.path, cwd=tmp_path)
    assert again.returncode == 2 and "finished" in again.stderr


def test_a_damaged_checkpoint_is_passed_over_and_changed_data_refused(recipe, tmp_path, monkeypatch):
    loaded = load(recipe)
    run = Run.create(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", lambda self, event: event["step"] == 17 and signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(run, loaded)
    weights = run.checkpoints()[-1] / "trained.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    data = tmp_path / "data.jsonl"
    text = data.read_text()
    data.write_text(text.replace("done", "gone"))
    with pytest.raises(UsageError, match="has changed"):
        train(run, loaded, resume=True)
    data.write_text(text)
    console = silent()
    assert train(run, loaded, console, resume=True)["steps"] == STEPS
    assert "checkpoint-17 is damaged" in console.warnings[0]


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(recipe, monkeypatch):
    """Also its log: what the first attempt wrote is not the second's."""

    class Killed(BaseException):
        pass

    def kill(self, event):
        if event["step"] == 3:
            raise Killed

    loaded = load(recipe, ["train.save_every=7", "train.eval_every=5"])
    run = Run.create(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", kill)
        with pytest.raises(Killed):
            train(run, loaded)
    train(run, loaded, resume=True)
    assert [event["step"] for event in run.events() if "loss" in event] == list(range(1, STEPS + 1))


def test_a_resumed_recipe_takes_its_newest_unfinished_run(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loaded = load(recipe, ["train.steps=2"])
    run = Run.create(loaded, given=recipe)
    assert cli.main(["train", "--resume", "recipe.yaml", "-q"]) == 2  # of 40 steps
    assert "train.steps" in capsys.readouterr().err
    assert cli.main(["train", "-q", "--train.steps", "2", "--resume", "recipe.yaml"]) == 0
    assert run.trained and len(list(run.path.parent.glob("2*"))) == 1
    run.status(state="failed", stage="evaluate")  # what became of a later stage does not matter
    assert cli.main(["train", "--resume", str(run.path), "-q"]) == 2
    assert "finished" in capsys.readouterr().err


def test_two_processes_cannot_work_on_one_run(recipe):
    run = Run.create(load(recipe))
    with lock(run / ".lock"), pytest.raises(RunError, match="another process"):
        train(run, run.recipe)
