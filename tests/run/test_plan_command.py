"""`peft plan`: tables and verdict in both languages, exit 4 with changes that do fit; and `peft train` refuses."""

from __future__ import annotations

import json

import pytest
import torch

from peft_run import cli, memory
from peft_run.config import build
from peft_run.errors import DoesNotFit, UsageError
from peft_run.plan import recipe as of_recipe
from peft_run.plan.batches import of_items
from peft_run.plan.batches import of_recipe as batches_of
from peft_run.run import Run
from peft_run.train import train

ROWS = [{"instruction": f"Say {word} " * 20, "output": "done " * 20} for word in "abcdefgh"]


@pytest.fixture
def recipe(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {json.dumps(str(tiny))}, dtype: fp32}}\ndata: {{train: data.jsonl}}\n"
        "train: {steps: 2, batch: 4}\noutput: {dir: runs}\n"
    )
    return tmp_path / "r.yaml"


def planned(capsys, *arguments):
    code = cli.main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_holds_tables_largest_and_verdict(recipe, capsys):
    code, out, _ = planned(capsys, recipe, "--json", "--memory", "100GiB")
    found = json.loads(out)
    assert code == 0 and found["verdict"] == "fits"
    assert list(found["plans"]) == ["full", "lora", "lora 8 bit", "lora 4 bit"] and found["method"] == "lora"
    full, lora, eight, four = found["plans"].values()
    assert full["optimizer"] > lora["optimizer"] == eight["optimizer"]
    assert four["weights"] < eight["weights"] < lora["weights"]
    assert found["trained"] == sum(group["numbers"] for group in found["trainable"]) > 0
    assert found["largest"]["batch"] > 4 and found["largest"]["length"] > found["length"]


@pytest.mark.parametrize(("language", "word"), [("en", "It fits"), ("zh", "可以运行")])
def test_text_in_both_languages(recipe, capsys, language, word):
    code, out, _ = planned(capsys, recipe, "--lang", language)
    assert code == 0 and word in out and "self_attn.q_proj" in out and "lora *" in out


def test_a_model_alone_is_enough(tiny, capsys):
    code, out, _ = planned(capsys, tiny, "--method", "ia3", "--json", "data.max_length=64", "train.batch=2")
    found = json.loads(out)
    assert code == 0 and found["method"] == "ia3" and (found["batch"], found["length"]) == (2, 64)


@pytest.mark.parametrize(("language", "word"), [("en", "does not fit"), ("zh", "内存不足")])
def test_exit_4_names_changes(recipe, capsys, monkeypatch, language, word):
    everything = planned(capsys, recipe, "train.batch=64", "--json")
    peak = json.loads(everything[1])["plans"]["lora"]["peak"]
    monkeypatch.setattr(memory, "resident", lambda: 0)
    code, out, err = planned(capsys, recipe, "train.batch=64", "--json", "--lang", language, "--memory", peak - 1)
    found = json.loads(out)
    assert code == 4 and found["verdict"] == "exceeds" and word in err
    assert found["remedies"] and all(change in err for change in found["remedies"])
    changes = found["remedies"][0].split()
    code, out, _ = planned(capsys, recipe, "train.batch=64", "--json", "--memory", peak - 1, *changes)
    assert code == 0 and json.loads(out)["plans"]["lora"]["peak"] < peak


def test_nothing_fits_into_nothing(recipe, capsys, monkeypatch):
    monkeypatch.setattr(memory, "resident", lambda: 0)
    code, _, err = planned(capsys, recipe, "--memory", "1KiB")
    assert code == 4 and "Nothing that was tried" in err


def test_training_is_refused_before_the_weights_are_loaded(recipe, tmp_path, monkeypatch):
    from peft_run import base

    monkeypatch.setattr(memory, "resident", lambda: 0)
    small = build({**raw(recipe), "train": {"steps": 1, "batch": 4, "max_memory": "100KB"}}, tmp_path)
    loads = []
    monkeypatch.setattr(base, "load_base", lambda *a, **k: loads.append(a))
    with pytest.raises(DoesNotFit, match="does not fit"):
        train(Run.create(small), small)
    assert not loads
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train(Run.create(small), small, force=True)["steps"] == 1


def test_training_goes_on_where_planning_fails(recipe, tmp_path, monkeypatch, capsys):
    from peft_run.console import Console

    def broken(*arguments):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(of_recipe, "plan", broken)
    one = build({**raw(recipe), "train": {"steps": 1, "batch": 2}}, tmp_path)
    assert train(Run.create(one), one, Console("en"))["steps"] == 1
    assert "no kernel for this" in capsys.readouterr().err


def raw(recipe):
    from peft_run.config.load import read

    return read(recipe)


def test_probe_measures_two_steps(recipe, capsys):
    code, out, _ = planned(capsys, recipe, "--probe", "--json")
    found = json.loads(out)["probe"]
    assert code == 0 and found["steps"] == 2
    assert found["step_seconds"] > 0 and found["seconds"] > 0 and found["peak"] >= 0
    assert not list(recipe.parent.glob("runs/*"))


@pytest.mark.parametrize(
    ("text", "size"), [("7GiB", 7 << 30), ("1.5 GB", 1_500_000_000), ("100", 100), ("2m", 2_000_000), ("3 KiB", 3072)]
)
def test_sizes(text, size):
    assert memory.size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "7 Gibberish", "-1GB"])
def test_wrong_sizes(text, recipe, capsys):
    with pytest.raises(UsageError):
        memory.size_of(text)


def test_memory_of_a_container(tmp_path):
    def left():
        return memory.left_in(tmp_path, "memory.max", "memory.current", "inactive_file")

    assert left() is None
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert left() is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert left() == 100
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 550\nactive_file 50\n")
    assert left() == 650, "cached files give way"
    assert memory.available() > 0 and memory.resident() > 1 << 20


TASKS = {
    "seq_cls": [{"text": "word " * (5 + n), "label": "ab"[n % 2]} for n in range(8)],
    "dpo": [{"prompt": f"q {n}", "chosen": "yes " * 9, "rejected": "no " * 9} for n in range(8)],
    "kto": [{"prompt": f"q {n}", "completion": "yes " * 9, "label": n % 2 == 0} for n in range(8)],
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_have_shapes_like_their_real_batches(task, tmp_path, tiny):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASKS[task]))
    made = build({"task": task, "model": {"path": str(tiny), "dtype": "fp32"}, "data": {"train": "data.jsonl"},
                  "train": {"batch": 2}}, tmp_path)  # fmt: skip
    batches = batches_of(made)
    here = of_recipe.plan(made, batches)
    assert here.at(batch=4).activations == pytest.approx(2 * here.activations, rel=0.05)
    assert here.peak > here.weights + here.optimizer


def test_a_batch_as_shapes(tiny, tmp_path, recipe):
    from peft_run.console import silent
    from peft_run.data.dataset import load_dataset
    from peft_run.train.stage import make_task

    made = build(raw(recipe), tmp_path)
    dataset = load_dataset(made)
    task = make_task(made, dataset.labels)
    items = task.encode_all(dataset.train, silent())
    batches = of_items(made, task, items, [])
    real = task.collate(sorted(items, key=lambda item: item.length)[-4:])
    shapes = batches.make(4, batches.length)
    tensors = {name: value.shape for name, value in real.items() if isinstance(value, torch.Tensor)}
    assert {name: shapes[name].shape for name in tensors} == tensors
    assert all(shapes[name].is_meta for name in tensors)
    assert batches.make(8, batches.length)["at"].shape[0] == 2 * shapes["at"].shape[0]
