"""`peft sweep`: what it tries, that it bears crashes, and that its best recipe gives the same again."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_run
from peft_run import base, kept
from peft_run.config import build, load
from peft_run.console import silent
from peft_run.data.dataset import load_dataset, part_of
from peft_run.errors import Interrupted
from peft_run.run import Run
from peft_run.sweep import results, start
from peft_run.sweep.folder import Folder
from peft_run.sweep.results import levels, pareto, ranking
from peft_run.sweep.settings import Range, load_settings
from peft_run.sweep.space import Space, key_of

NOUNS = ("room", "book", "food", "staff", "film", "bed", "desk", "view")
WORDS = {"good": ("fine", "nice", "great"), "bad": ("poor", "dull", "awful")}
TEXTS = [(f"{word} {noun}", label) for label, words in WORDS.items() for word in words for noun in NOUNS]


@pytest.fixture
def recipe(tmp_path, tiny):
    rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in TEXTS)
    (tmp_path / "data.jsonl").write_text(rows)
    values = {
        "task": "seq_cls",
        "model": {"path": str(tiny), "dtype": "fp32"},
        "data": {"train": "data.jsonl", "eval": {"split": 0.25}, "max_length": 32},
        "adapter": {"r": 4},
        "train": {"steps": 12, "batch": 4, "lr": 1e-2, "eval_every": 4, "save_every": 2},
        "output": {"dir": "runs", "name": "words"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def space_of(axes, **more):
    return Space(load_settings(None, [], axes=axes, **more), build({}))


# -- points -----------------------------------------------------------------------------------------------------------

numbers = st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True)


@given(numbers, numbers, st.integers(0, 99), st.integers(1, 40))
def test_a_grid_has_every_point_once_and_a_random_draw_none_twice(ranks, batches, seed, trials):
    space = space_of({"adapter.r": ranks, "train.batch": batches})
    every = [key_of(point) for point in space.grid()]
    assert len(set(every)) == len(every) == len(ranks) * len(batches) == space.size
    drawn = [key_of(point) for point in itertools.islice(space.random(seed), trials)]
    assert len(set(drawn)) == len(drawn) == min(trials, len(every)) and set(drawn) <= set(every)
    longer = [key_of(point) for point in itertools.islice(space.random(seed), trials + 3)]
    assert longer[: len(drawn)] == drawn, "more trials begin with the same ones"


@given(st.floats(1e-6, 1e-3), st.floats(1.5, 1e3), st.booleans(), st.integers(0, 99))
def test_ranges_stay_within_their_ends(low, factor, log, seed):
    space = space_of({"train.lr": {"low": low, "high": low * factor, "log": log}}, search="random", trials=5)
    points = list(itertools.islice(space.random(seed), 5))
    assert all(low * (1 - 1e-5) <= point["train.lr"] <= low * factor * (1 + 1e-5) for point in points)
    assert len({point["train.lr"] for point in points}) == 5
    ranks = space_of({"adapter.r": {"low": 2, "high": 5, "log": log}}, search="random", trials=9)
    assert {point["adapter.r"] for point in ranks.random(seed)} == {2, 3, 4, 5}


def test_steps_of_ranges():
    assert Range(low=0, high=0.3, step=0.1).values() == [0, 0.1, 0.2, 0.3]
    assert Range(low=4, high=33, log=True, step=2).values() == [4, 8, 16, 32]


@given(st.integers(2, 60), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 9))
def test_a_larger_fraction_of_the_data_contains_a_smaller_one(count, one, other, seed):
    samples = [{"text": str(i), "label": "ab"[i % 3 == 0]} for i in range(count)]
    small, large = (part_of(samples, share, seed) for share in sorted((one, other)))
    assert all(sample in large for sample in small) and small
    share = sum(sample["label"] == "b" for sample in large) / len(large)
    assert abs(share - sum(s["label"] == "b" for s in samples) / count) <= 1 / len(large) + 1e-9
    assert [s for s in samples if s in large] == large, "in their order"


def test_the_labels_and_the_held_out_part_do_not_depend_on_the_fraction(recipe):
    whole, part = load_dataset(load(recipe)), load_dataset(load(recipe, ["data.fraction=0.1"]))
    assert part.labels == whole.labels and part.eval == whole.eval and len(part.train) == round(0.1 * len(whole.train))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--axis", "adapter.rr=1,2"], "did you mean `adapter.r`"),
        (["--axis", "adapter.r=4,fast"], "`adapter.r`"),
        (["--axis", "adapter.r=4.5"], "`adapter.r`"),
        (["--axis", "lora_rank=4,4.0"], "same value twice"),
        (["--axis", "adapter.r=4", "--axis", "lora_rank=8"], "given twice"),
        (["--axis", "data.eval.split=0.1,0.2"], "cannot be an axis"),
        (["--axis", "train.lr={low: 1e-4, hgih: 1e-2}"], "did you mean `high`"),
        (["--axis", "train.lr={low: 1e-2, high: 1e-4}"], "low must be below high"),
        (["--axis", "train.lr={low: 1e-4, high: 1e-2, log: true}"], "a grid needs steps"),
        (["--axis", "adapter.r="], "is no axis"),
        (["--axis", "adapter.r=4", "--objective", "acuracy"], "did you mean accuracy"),
        (["--axis", "adapter.r=4,8,16", "--trials", "2"], "--search random"),
        (["--axis", "adapter.r=4", "--search", "random"], "number of trials"),
        (["--axis", "adapter.r=4", "--prune", "median"], "only with search: tpe"),
        (["data.eval.split=0", "--axis", "adapter.r=4"], "held-out data"),
        ([], "at least one"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(recipe, tmp_path, capsys, words, says):
    from peft_run.cli import main

    assert main(["--lang", "en", "sweep", str(recipe), *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/sweep-*"))


def test_an_unknown_key_of_the_file_is_refused(recipe, tmp_path, capsys):
    from peft_run.cli import main

    (tmp_path / "sweep.yaml").write_text("axes: {adapter.r: [2]}\nobjektive: loss\n")
    assert main(["--lang", "en", "sweep", str(recipe), str(tmp_path / "sweep.yaml")]) == 2
    assert "did you mean `objective`" in capsys.readouterr().err


# -- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_its_report_and_its_best_recipe(recipe, tmp_path, capsys):
    """One trial fails: its recipe asks for what the method does not have."""
    from peft_run.cli import main

    words = ["--axis", "adapter.method=lora,ia3", "--axis", "data.fraction=0.5,1"]
    assert main(["--lang", "zh", "sweep", str(recipe), "--objective", "accuracy", "--json", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    folder = Folder.open(tmp_path / "runs" / "words")
    assert shown["counts"] == {"done": 2, "pruned": 0, "failed": 2}
    trials = folder.trials()
    failed = [trial for trial in trials.values() if trial["state"] == "failed"]
    assert all(t["values"]["adapter.method"] == "ia3" and "IA3" in t["reason"] for t in failed)
    best = shown["ranking"][0]
    assert best["objective"] == max(t["objective"] for t in shown["ranking"]) and best["file_mb"] > 0
    assert (folder / best["run"] / "evaluation.jsonl").is_file()
    assert str(tmp_path) not in (folder / "trials.jsonl").read_text()

    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert '<html lang="zh-CN">' in page and "排名" in page and "<script" not in page and "http" not in page.replace(
        "http://www.w3.org/2000/svg", "")  # fmt: skip
    for trial in trials.values():
        assert trial.get("reason", "") in page
    for svg in (folder / "plots").glob("*.svg"):
        ET.fromstring(svg.read_text())
        assert f"plots/{svg.name}" in text
    assert {"curve.svg", "pareto-file_mb.svg", "effect-data-fraction.svg"} <= {
        p.name for p in (folder / "plots").iterdir()
    }

    written = tmp_path / "elsewhere" / "best.yaml"
    written.parent.mkdir()
    assert main(["sweep", "best", str(folder.path), "-o", str(written)]) == 0
    assert main(["sweep", "best", str(folder.path), "-o", str(written)]) == 2, "nothing is overwritten"
    again = load(written)
    assert again.eval.baseline and again.output.name == "words" and again.at(again.output.dir) == tmp_path / "runs"
    from peft_run.train import train

    run = Run.create(again)
    assert train(run, again)["eval_loss"] == best["eval_loss"], "the same loss, bit for bit"
    theirs = Run(folder / best["run"])
    weights = "adapter_model.safetensors"
    assert (run / weights).read_bytes() == (theirs / weights).read_bytes()


def begin(tmp_path, *words):
    command = [sys.executable, "-m", "peft_run", "sweep", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(peft_run.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)


def wait_for(process, tmp_path, pattern, text):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if any(text in path.read_text() for path in tmp_path.glob(pattern)):
            return
        time.sleep(0.01)
    raise AssertionError("the sweep does not get there")


@pytest.mark.slow
def test_killed_and_stopped_a_sweep_goes_on_and_ends_the_same(recipe, tmp_path):
    axes = [
        "--axis",
        "adapter.r=2,3",
        "train.steps=200",
        "train.eval_every=100",
        "train.save_every=10",
        "--objective",
        "loss",
    ]
    process = begin(tmp_path, recipe, *axes)
    wait_for(process, tmp_path, "runs/words/sweep-*/trials/0000/2*/trainer_log.jsonl", '"step": 9,')
    process.kill()
    process.communicate()
    folder = Folder.open(tmp_path / "runs" / "words")
    assert folder.trials()[0]["state"] == "started"

    process = begin(tmp_path, "--resume", folder.path)
    wait_for(process, tmp_path, "runs/words/sweep-*/trials/0001/2*/trainer_log.jsonl", '"step": 9,')
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in errors, errors
    first = folder.trials()[0]
    assert first["state"] == "done" and folder.trials()[1]["state"] == "started"
    with open(folder / "trials.jsonl", "a") as file:
        file.write('{"trial": 1, "sta')  # cut by a crash

    process = begin(tmp_path, "--resume", folder.path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    trials = folder.trials()
    assert trials[0] == first and len(list((folder / "trials").glob("*/2*"))) == 2, "a trial goes on in its own run"
    log = (Run.open(folder / "trials" / "0001") / "run.log").read_text()
    assert "Resumed" in log or "继续" in log

    from peft_run.train import train

    for number in (0, 1):
        alone = folder.recipe_of(trials[number]["values"])
        assert train(Run.create(alone), alone)["eval_loss"] == trials[number]["eval_loss"]


@pytest.mark.slow
def test_a_trial_that_takes_its_process_down_is_recorded_and_the_next_one_runs(recipe, tmp_path, monkeypatch):
    """The system kills the worker in the middle of the first trial."""
    from peft_run.sweep.child import Child

    killed = []
    ask = Child.ask

    def once(self, job, evaluated, interrupted):
        def then(event):
            if not killed:
                killed.append(self.process.pid)
                self.process.kill()
            return evaluated(event)

        return ask(self, job, then, interrupted)

    monkeypatch.setattr(Child, "ask", once)
    chosen = load_settings(None, ["adapter.r=2,3"], evaluate=False)
    folder = start(chosen, load(recipe), silent())
    first, second = folder.trials().values()
    assert (first["state"], second["state"]) == ("failed", "done") and "killed" in first["reason"].lower()
    assert "SIGKILL" in (folder / "report.html").read_text()
    found = results.result(folder)
    assert found["best"] == 1 and found["counts"]["failed"] == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed")
def test_a_study_is_resumed_shared_and_prunes(recipe, tmp_path, monkeypatch):
    from peft_run.sweep import resume
    from peft_run.sweep.child import Child

    axes = {"train.lr": {"low": 1e-5, "high": 1e-1, "log": True}, "adapter.r": [2, 4], "adapter.method": ["lora"]}
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    chosen = load_settings(None, [], axes=axes, search="tpe", trials=2, evaluate=False, storage=storage, study="one")
    first = start(chosen, load(recipe), silent())
    assert [t["state"] for t in first.trials().values()] == ["done", "done"]
    assert all(1e-5 <= t["values"]["train.lr"] <= 1e-1 and t["values"]["adapter.r"] in (2, 4)
               for t in first.trials().values())  # fmt: skip

    second = start(chosen.model_copy(update={"trials": 3}), load(recipe), silent())
    assert list(second.trials()) == [2], "another machine takes the trial that is left"

    own = load_settings(None, [], axes=axes, search="tpe", trials=8, evaluate=False, prune="median")
    monkeypatch.setattr(Child, "ask", answers())
    with pytest.raises(Interrupted):
        start(own, load(recipe), silent())
    third = max((Folder(p) for p in (tmp_path / "runs" / "words").glob("sweep-*")), key=lambda f: len(f.trials()))
    states = [t["state"] for t in third.trials().values()]
    assert states == ["done"] * 5 + ["started"]
    assert resume(third.path, silent()).path == third.path
    states = [t["state"] for t in third.trials().values()]
    assert states == ["done"] * 5 + ["pruned"] * 3


def answers():
    """Stands in for the training: five trials that get better, an interruption, then bad ones."""
    seen = []

    def answer(self, job, evaluated, interrupted):
        if job["do"] == "check":
            return {"ended": "checked", "dtype": "fp32"}
        seen.append(job["number"])
        if len(seen) == 6:
            return {"ended": "interrupted"}
        loss = 1.0 if len(seen) < 6 else 5.0
        for step in (1, 2):
            if not evaluated({"step": step, "total": 4, "eval_loss": loss}):
                return {"ended": "pruned", "run": "none"}
        facts = dict.fromkeys(("peak_memory_mb", "file_mb", "seconds"), 1.0)
        return {"ended": "done", "run": "none", "objective": loss, "measures": {}, "eval_loss": loss, **facts}

    return answer


# -- figures ----------------------------------------------------------------------------------------------------------


def made(number, objective, memory=1.0, size=1.0, **values):
    return {"trial": number, "state": "done", "objective": objective, "peak_memory_mb": memory, "file_mb": size,
            "values": values}  # fmt: skip


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points):
    trials = [made(i, *point) for i, point in enumerate(points)]
    chosen = load_settings(None, ["adapter.r=1"], objective="loss")
    front = pareto(ranking(trials, chosen), chosen)
    for i, point in enumerate(points):
        beaten = any(all(a <= b for a, b in zip(o, point)) and o != point for o in points)
        assert (i in front) != beaten


def test_ranking_follows_the_direction():
    trials = [made(0, 0.2), made(1, 0.9), made(2, 0.9)]
    order = {o: [t["trial"] for t in ranking(trials, load_settings(None, ["adapter.r=1"], objective=o))]
             for o in ("loss", "accuracy")}  # fmt: skip
    assert order == {"loss": [0, 1, 2], "accuracy": [1, 2, 0]}


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40, unique=True))
def test_levels_of_an_axis_are_few_and_in_order(values):
    trials = [made(i, 0.0, x=value) for i, value in enumerate(values)]
    places = levels(trials, "x")
    assert len(places.names) <= 8
    assert [places[value] for value in sorted(values)] == sorted(places[value] for value in values)


def test_effects_heat_and_spread_over_seeds():
    trials = [made(i, objective, **{"adapter.r": r, "train.seed": s})
              for i, (r, s, objective) in enumerate([(4, 0, 1.0), (4, 1, 3.0), (8, 0, 5.0), (8, 1, 5.0)])]  # fmt: skip
    rows = results.effect(trials, "adapter.r")
    assert [(row["level"], row["trials"], row["mean"]) for row in rows] == [("4", 2, 2.0), ("8", 2, 5.0)]
    assert results.heat(trials[:3], "adapter.r", "train.seed")[2] == [[1.0, 3.0], [5.0, None]]
    assert results.seed_spread(trials) == pytest.approx(1.0)  # variances 2 and 0


# -- the base model, read once ----------------------------------------------------------------------------------------


def test_a_kept_base_is_read_once_and_anew_after_it_was_changed(recipe):
    import torch

    from peft_run.train.loop import seed_everything

    chosen = load(recipe)

    def take():
        seed_everything(1, -1)
        return base.load_base(chosen, "AutoModelForSequenceClassification", torch.float32, num_labels=2), torch.rand(3)

    plain, after = take()
    with kept.kept() as keeper:
        models = [take() for _ in range(2)]
        assert keeper.reads == 1
        for model, drawn in models:
            assert torch.equal(drawn, after), "random numbers go on as after reading"
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert models[0][0] is not models[1][0]
        with torch.no_grad():
            next(models[0][0].parameters())[0] += 1
        again, _ = take()
        assert keeper.reads == 2
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
