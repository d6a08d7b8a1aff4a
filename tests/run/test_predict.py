"""`peft predict`: answers to a file's rows, for every task."""

from __future__ import annotations

import csv
import json

import pytest
from test_evaluate import SAYS
from test_tasks import PAIRS, QUESTIONS, TAGGED
from test_train import CHATS, REVIEWS, train_one, write

from peft_run.errors import UsageError
from peft_run.predict import predict


def trained(tmp_path, model, rows, **sections):
    return train_one(tmp_path, model, rows, **{"train": {"steps": 2}, **sections})[0]


def answers(run, rows, folder, **settings):
    """The rows of the output for these input rows."""
    recipe = run.recipe
    recipe.eval.generate.max_new_tokens = 5
    recipe.eval.batch = 3
    predict(run, write(folder / "in.jsonl", rows), folder / "out.jsonl", recipe, **settings)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("chats")
    return trained(folder, tiny, SAYS, train={"epochs": 3, "batch": 8})


def test_chats_are_answered_in_their_order_whatever_the_batch(tmp_path, chats):
    rows = [{"instruction": f"Say {'x' * (7 * i % 5)}{i}.", "number": i} for i in range(10)]
    found = answers(chats, rows, tmp_path)
    assert [row["number"] for row in found] == list(range(10))
    for row in rows[:4]:
        assert answers(chats, [row], tmp_path)[0]["prediction"] == found[row["number"]]["prediction"]


def test_the_answer_in_a_row_is_not_seen(tmp_path, chats):
    rows = [{"instruction": "Say a1."}, {"instruction": "Say a1.", "output": "no, never"}]
    one, other = (answers(chats, [row], tmp_path)[0] for row in rows)
    assert one["prediction"] == other["prediction"] and other["output"] == "no, never"


def test_earlier_turns_are_seen_and_the_last_answer_is_not(tmp_path, chats):
    chat = [{"role": "user", "content": "Say a1."}, {"role": "assistant", "content": "yes"}]
    first, ended, further = (
        answers(chats, [{"messages": messages}], tmp_path)[0]["prediction"]
        for messages in (chat[:1], chat, [*chat, {"role": "user", "content": "Say b2."}])
    )
    assert first == ended == answers(chats, [{"instruction": "Say a1."}], tmp_path)[0]["prediction"]
    from peft_run import artefact
    from peft_run.data.questions import find, question

    rows = [{"messages": [*chat, {"role": "user", "content": "Say b2."}]}]
    sample = question(rows[0], *find(rows, chats.recipe, {}, {}, ""), chats.recipe)
    assert sample == {"ask": rows[0]["messages"]}
    assert isinstance(further, str) and artefact.load(chats).renderer.prompt(sample["ask"])


def test_a_classifier_names_the_label_and_its_probability(tmp_path, tiny):
    run = trained(tmp_path, tiny, REVIEWS, task="seq_cls", train={"epochs": 10})
    found = answers(run, [{"text": "foul 3"}, {"text": "nice 3"}], tmp_path)
    assert [row["prediction"] for row in found] == ["bad", "good"]
    assert max(found[0]["probabilities"], key=found[0]["probabilities"].get) == "bad"
    predict(run, tmp_path / "in.jsonl", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["prediction"] for row in table] == ["bad", "good"] and "bad" in table[0]["probabilities"]


def test_columns_are_those_of_the_training_data(tmp_path, tiny):
    rows = [{"说的话": row["text"], "好坏": row["label"]} for row in REVIEWS]
    data = {"train": [{"path": str(tmp_path / "data.jsonl"), "map": {"text": "说的话", "label": "好坏"}}]}
    write(tmp_path / "data.jsonl", rows)
    run = trained(tmp_path, tiny, rows, task="seq_cls", data=data)
    assert answers(run, [{"说的话": "foul 3", "note": 1}], tmp_path)[0]["prediction"] in ("bad", "good")
    assert answers(run, [{"other": "foul 3"}], tmp_path, mapping={"text": "other"})[0]["prediction"]
    with pytest.raises(UsageError, match="other"):
        answers(run, [{"other": "foul 3"}], tmp_path)
    with pytest.raises(UsageError, match="gone"):
        answers(run, [{"other": "foul 3"}], tmp_path, mapping={"text": "gone"})


def test_a_generative_classifier_asks_with_the_recipes_prompt(tmp_path, tiny):
    from peft_run.data.questions import find, question

    run = trained(tmp_path, tiny, REVIEWS, data={"prompt": "Review: {text}", "system": "Be brief."})
    rows = [{"text": "foul 3"}]
    seen = run.read_json("env.json")["data"]["train"][0]
    asked = question(rows[0], *find(rows, run.recipe, seen, {}, ""), run.recipe)["ask"]
    assert asked == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Review: foul 3"}]


@pytest.mark.parametrize(
    ("task", "rows", "asked", "check"),
    [
        ("token_cls", TAGGED, {"tokens": ["Ann", "met", "", "Bob"]}, lambda row: len(row["prediction"]) == 4),
        (
            "qa",
            QUESTIONS,
            {"question": "where?", "context": " in Oslo"},
            lambda row: " in Oslo"[row["start"] :].startswith(row["prediction"]),
        ),
        ("dpo", PAIRS, {"prompt": "Say 3."}, lambda row: isinstance(row["prediction"], str)),
        ("causal_lm", [{"text": "abc abc"}] * 4, {"text": "abc"}, lambda row: isinstance(row["prediction"], str)),
    ],
)
def test_every_task_answers(tmp_path, tiny, task, rows, asked, check):
    run = trained(tmp_path, tiny, rows, task=task)
    (row,) = answers(run, [asked], tmp_path)
    assert check(row) and all(row[name] == value for name, value in asked.items())


def test_nothing_half_written_stays(tmp_path, tiny, monkeypatch):
    from peft_run.judges.chat import ChatJudge

    run = trained(tmp_path, tiny, CHATS)
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(UsageError, match="row 2") as caught:
        answers(run, [{"instruction": "a"}, {"instruction": ""}], tmp_path)
    assert caught.value.exit_code == 2
    for name in ("out.txt", "nowhere/out.jsonl"):
        with pytest.raises(UsageError, match=r"out|nowhere"):
            predict(run, tmp_path / "in.jsonl", tmp_path / name)
    monkeypatch.setattr(ChatJudge, "look", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(run, [{"instruction": "a"}], tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_writes_lines_to_stdout(tmp_path, chats, capsys, monkeypatch):
    from peft_run.cli import main

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"instruction": "说 a1."}, {"instruction": ""}])
    options = ["-i", "in.jsonl", "eval.generate.max_new_tokens=3"]
    assert main(["predict", str(chats.path), *options, "--lang", "zh"]) == 2
    write(tmp_path / "in.jsonl", [{"instruction": "说 a1."}])
    capsys.readouterr()
    assert main(["infer", str(chats.path), *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["instruction"] == "说 a1." and "说" in line
