"""Commands that the web page starts live on without it: real processes, found again by a page that knows nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import python_path

from peft_run.run import Run
from peft_run.ui.client import Server, free_port
from peft_run.ui.jobs import Jobs, is_running, state_of, tail
from peft_run.ui.workspace import Workspace

WAITS = "import sys, time; print('began', file=sys.stderr, flush=True); time.sleep(60)"


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path())
    found = Jobs(Workspace(tmp_path / "space"))
    yield found
    for job in found.all():
        if job.pid is not None:
            os.kill(job.pid, signal.SIGKILL)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def start(jobs, monkeypatch, program):
    """A job that runs a small program in the place of `peft`."""
    monkeypatch.setattr("peft_run.ui.jobs.command_words", lambda *words, **more: [sys.executable, "-c", program])
    return jobs.start("train", "train", "x.yaml", language="en", note="kept")


def test_how_a_command_ended_is_in_its_folder(jobs, monkeypatch):
    for program, state in (("print('out')", "done"), ("raise SystemExit(4)", "failed"), ("exit(130)", "interrupted")):
        job = start(jobs, monkeypatch, program)
        assert job.state in ("starting", "running") or not job.is_on
        until(lambda job=job: not job.is_on)
        assert job.state == state, job.log()
    assert jobs.all("train")[-1].out() == "out\n" and jobs.all("other") == []


def test_a_job_outlives_the_page_and_a_new_page_finds_and_stops_it(jobs, monkeypatch, tmp_path):
    page = f"""
import sys
import peft_run.ui.jobs as module
from peft_run.ui.workspace import Workspace
module.command_words = lambda *words, **more: [sys.executable, "-c", {WAITS!r}]
module.Jobs(Workspace({str(jobs.workspace.root)!r})).start("train", "train", language="zh", port=5)
"""
    subprocess.run([sys.executable, "-c", page], check=True, timeout=60)  # this page is gone now
    until(lambda: jobs.all() and jobs.all()[0].pid is not None)
    job = Jobs(Workspace(jobs.workspace.root)).all("train")[0]
    assert job.state == "running" and job.more == {"port": 5} and os.getsid(job.pid) != os.getsid(0)
    until(lambda: "began" in job.log())
    job.stop()
    until(lambda: not job.is_on)
    assert job.state == "interrupted"


def test_a_job_that_is_killed_has_failed_and_one_without_a_trace_is_lost(jobs, monkeypatch):
    job = start(jobs, monkeypatch, WAITS)
    until(lambda: job.pid is not None)
    os.kill(job.pid, signal.SIGKILL)
    until(lambda: not job.is_on)
    assert job.state == "failed"
    job = start(jobs, monkeypatch, WAITS)
    until(lambda: job.pid is not None)
    began = json.loads((job.folder / "began.json").read_text())
    os.kill(began["keeper"], signal.SIGKILL)
    assert job.state == "running"  # the command itself is there
    os.kill(began["pid"], signal.SIGKILL)
    until(lambda: not job.is_on)
    assert job.state == "lost"


def test_the_number_of_an_ended_process_that_another_one_has_is_no_sign_of_life():
    assert is_running(os.getpid(), time.time())
    assert not is_running(os.getpid(), time.time() - 1e6)  # this one began later
    assert not is_running(2**22 + 5, time.time())


def test_keys_of_servers_are_for_the_owner_only(jobs, monkeypatch):
    job = start(jobs, monkeypatch, "pass")
    assert job.folder.stat().st_mode & 0o077 == 0 and job.folder.parent.stat().st_mode & 0o077 == 0


def test_a_long_log_is_cut_at_a_line(tmp_path):
    file = tmp_path / "log.txt"
    file.write_text("".join(f"line {i} 行\n" for i in range(10_000)), encoding="utf-8")
    shown = tail(file)
    assert shown.endswith("line 9999 行\n") and shown.startswith("line ") and len(shown) < 21_000
    assert tail(tmp_path / "none") == ""


def test_runs_are_found_by_what_is_in_them(tmp_path):
    space = Workspace(tmp_path)
    names = ["runs/a/20260101-000000-aaaa", "elsewhere/b/20260102-000000-bbbb"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for file in ("config.yaml", "command.txt"):
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "runs" / "a" / "latest").symlink_to("20260101-000000-aaaa")
    (tmp_path / ".hidden").mkdir()
    assert space.runs() == names[::-1] and space.finished() == []
    run = space.run("runs/a")  # an experiment's folder: its newest run
    assert isinstance(run, Run) and run.path == tmp_path.resolve() / names[0]


def test_a_run_whose_process_is_gone_is_not_called_running(tmp_path):
    run = Run(tmp_path)
    assert state_of(run) == "new"
    run.write_json("status.json", {"state": "running", "pid": 2**22 + 5, "started": time.time()})
    assert state_of(run) == "gone"
    run.write_json("status.json", {"state": "running", "pid": os.getpid(), "started": time.time()})
    assert state_of(run) == "running"


def test_a_server_that_is_not_there_serves_nothing(jobs, monkeypatch):
    monkeypatch.setattr("peft_run.ui.jobs.command_words", lambda *words, **more: [sys.executable, "-c", "pass"])
    job = jobs.start("serve", "serve", language="en", port=free_port(), key="k")
    assert Server(job).models() == []
