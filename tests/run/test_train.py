"""`peft train`, from a file of data to a run that others can read."""

import json

import pytest
import torch

from peft_run import artefact
from peft_run.config import build
from peft_run.console import silent
from peft_run.run import Run
from peft_run.train import train

CHATS = [{"instruction": f"Say {word}.", "output": "done"} for word in "abcdefghijklmnop"]
REVIEWS = [
    {"text": f"{word} {i}", "label": name} for i in range(8) for word, name in (("nice", "good"), ("foul", "bad"))
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_for(tmp_path, base, rows, /, **sections):
    data = {"train": str(write(tmp_path / "data.jsonl", rows)), **sections.pop("data", {})}
    settings = {"lr": 1e-2, "batch": 4, **sections.pop("train", {})}
    model = {"path": str(base), "dtype": "fp32", **sections.pop("model", {})}
    output = {"dir": str(tmp_path / "runs"), "name": "test"}
    return build({"model": model, "data": data, "train": settings, "output": output, **sections}, tmp_path)


def train_one(*arguments, **sections):
    recipe = recipe_for(*arguments, **sections)
    run = Run.create(recipe)
    return run, train(run, recipe)


def test_a_chat_model_learns_and_loads_from_its_run(tmp_path, tiny):
    run, result = train_one(tmp_path, tiny, CHATS, train={"epochs": 20})
    assert result["loss_last"] < 0.7 * result["loss_first"]
    for name in (
        "config.yaml",
        "env.json",
        "trainer_log.jsonl",
        "artefact.json",
        "chat_template.jinja",
        "tokenizer.json",
    ):
        assert (run / name).is_file(), name
    assert Run.open(tmp_path / "runs" / "test").path == run.path.resolve()

    tuned = artefact.load(run)
    held_out = tuned.task.encode_all(tuned_samples(run), silent(), training=False)
    batch = tuned.task.collate(held_out)
    tuned_loss = tuned.task.score(tuned.model, batch)["loss"]
    with tuned.model.disable_adapter():
        base_loss = tuned.task.score(tuned.model, batch)["loss"]
    assert tuned_loss < base_loss
    assert tuned_loss / batch["units"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert tuned.stop_ids == [2]


def tuned_samples(run):
    from peft_run.data.dataset import load_dataset

    return load_dataset(run.recipe).eval


def test_a_classifier_learns_a_head_with_the_names_of_the_labels(tmp_path, tiny):
    run, result = train_one(tmp_path, tiny, REVIEWS, task="seq_cls", train={"epochs": 10})
    assert result["eval_accuracy"] == 1.0
    tuned = artefact.load(run)
    assert tuned.labels == ["bad", "good"]
    with torch.no_grad():
        items = tuned.task.encode_all([{"text": "foul 3"}, {"text": "nice 3"}], silent(), training=False)
        logits = tuned.task.logits(tuned.model, tuned.task.collate(items))
    assert [tuned.labels[i] for i in logits.argmax(1)] == ["bad", "good"]


def test_a_moved_run_is_still_a_run(tmp_path, tiny):
    run, _ = train_one(tmp_path, tiny, CHATS, train={"steps": 2})
    text = "".join(
        (run / name).read_text() for name in ("env.json", "status.json", "trainer_log.jsonl", "artefact.json")
    )
    assert str(run.path) not in text
    moved = run.path.rename(tmp_path / "elsewhere")
    assert artefact.load(moved, base_path=str(tiny)).info["step"] in (1, 2)


def test_a_changed_template_is_refused(tmp_path, tiny):
    from peft_run.errors import RunError

    run, _ = train_one(tmp_path, tiny, CHATS, train={"steps": 1})
    (run / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(RunError, match="chat template"):
        artefact.load(run)


def test_accumulated_batches_are_one_large_batch(tmp_path, tiny):
    """Samples of different lengths: a mean of means would differ."""
    results = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        settings = {"batch": batch, "accumulate": accumulate, "steps": 3, "batching": "shuffled"}
        _, result = train_one(tmp_path, tiny, CHATS, data={"eval": {"split": 0}}, train=settings)
        results.append(result["loss_last"])
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)


def test_packing_changes_nothing_but_the_padding(tmp_path, tiny):
    results = [
        train_one(tmp_path, tiny, CHATS, data={"packing": packing}, train={"steps": 3})[1] for packing in (False, True)
    ]
    assert results[0]["loss_last"] == pytest.approx(results[1]["loss_last"], rel=1e-4)
