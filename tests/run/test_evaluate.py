"""`peft evaluate`: base against tuned, for every task."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_tasks import PAIRS, QUESTIONS, TAGGED, tiny_t5  # noqa: F401
from test_train import REVIEWS, recipe_for, train_one, write

from peft_run.config import build
from peft_run.errors import UsageError
from peft_run.evaluate import evaluate, gates
from peft_run.run import Run
from peft_run.train import train

SAYS = [{"instruction": f"Say {letter}{i}.", "output": "yes" if i % 2 else "no"} for i in range(10) for letter in "ab"]


def judged(tmp_path, model, rows, changes=None, **sections):
    """A short training on these rows, judged on all of them."""
    data = {"eval": {"split": 0}, **sections.pop("data", {})}
    run, _ = train_one(tmp_path, model, rows, data=data, **sections)
    return run, evaluate(run, with_test(run, tmp_path, **(changes or {})))


def with_test(run, tmp_path, **changes):
    recipe = run.recipe
    recipe.data.test = build({"data": {"test": str(tmp_path / "data.jsonl")}}).data.test
    recipe.eval.generate.max_new_tokens = 6
    for name, value in changes.items():
        setattr(recipe.eval, name, value)
    return recipe


@pytest.fixture(scope="module")
def said(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("said")
    return folder, *judged(folder, tiny, SAYS, train={"epochs": 12, "batch": 8})


def samples_of(run):
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]


def test_figures_have_intervals_and_a_verdict(said):
    _, run, result = said
    assert run.read_json("metrics.json")["evaluate"] == json.loads(json.dumps(result))
    assert result["source"] == "test" and result["samples"] == 20 and result["base"] == "adapter_off"
    for name in ("loss", "perplexity", "accuracy", "macro_f1"):
        metric = result["metrics"][name]
        for side in ("base", "tuned", "difference"):
            low, high = metric[f"{side}_interval"]
            assert low <= metric[side] <= high
        assert metric["difference"] == pytest.approx(metric["tuned"] - metric["base"])
    loss = result["metrics"]["loss"]
    assert loss["tuned"] < loss["base"] and loss["p"] < 0.01 and loss["verdict"] == "better"
    assert result["metrics"]["perplexity"]["tuned"] == pytest.approx(math.exp(loss["tuned"]))
    assert set(result["forgetting"]) == {"en", "zh"}
    assert all(text["ratio"] == pytest.approx(text["tuned"] / text["base"]) for text in result["forgetting"].values())
    assert any(note["note"] == "evaluate.leaked" and note["count"] == 20 for note in result["notes"])


def test_the_loss_and_the_answers_are_those_of_the_model_alone(said):
    """One chat at a time, without padding, by transformers' own loss and generate."""
    from peft_run import artefact

    _, run, result = said
    tuned = artefact.load(run)
    total, count = 0.0, 0
    for sample in samples_of(run):
        messages = [{"role": "user", "content": sample["prompt"]}]
        prompt = torch.tensor([tuned.renderer.prompt(messages)])
        answer = {"role": "assistant", "content": sample["reference"]}
        (item,) = tuned.renderer.items([*messages, answer])
        ids, labels = torch.tensor([list(item.ids)]), torch.tensor([list(item.labels)])
        for side in ("tuned", "base"):
            with torch.no_grad(), tuned.model.disable_adapter() if side == "base" else torch.no_grad():
                written = tuned.model.generate(
                    input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
                )
                text = tuned.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
                assert sample[side]["answer"] == text.strip()
                if side == "tuned":
                    learnt = int((labels != -100).sum())
                    total += tuned.model(input_ids=ids, labels=labels).loss.item() * learnt
                    count += learnt
    assert result["metrics"]["loss"]["tuned"] == pytest.approx(total / count, rel=1e-5)


def test_a_few_repeated_references_are_labels(said):
    _, run, result = said
    assert result["labels"] == ["no", "yes"] and result["support"] == [10, 10]
    assert result["commonest"] == {"label": "no", "accuracy": 0.5}
    right = sum(s["tuned"]["answer"] == s["reference"] for s in samples_of(run))
    assert result["metrics"]["accuracy"]["tuned"] == right / 20
    table = result["confusion"]["tuned"]
    assert table[0][0] + table[1][1] == right and sum(map(sum, table)) == 20


def test_the_report_can_be_read_without_anything_else(said):
    _, run, result = said
    page = (run / "evaluation.html").read_text(encoding="utf-8")
    for text in ("<table", "Say a", "macro_f1", result["picks"]["best"] and "Best samples"):
        assert text in page
    for outside in ("<script", "http://", "https://", "src=", "@import"):
        assert outside not in page
    assert "| loss |" in (run / "evaluation.md").read_text(encoding="utf-8")
    order = [samples_of(run)[i]["tuned"]["measures"]["accuracy"] for i in result["picks"]["best"]]
    assert order == sorted(order, reverse=True)


def test_again_is_the_same(said):
    folder, run, result = said
    assert evaluate(run, with_test(run, folder)) == result


def test_what_is_asked_for_only(said):
    folder, run, _ = said
    changes = {"metrics": ["perplexity"], "baseline": False, "sample": 7, "forgetting": "none"}
    result = evaluate(run, with_test(run, folder, **changes))
    assert list(result["metrics"]) == ["perplexity"] and result["samples"] == 7
    assert "base" not in result["metrics"]["perplexity"] and result["forgetting"] == {}
    assert all(sample["tuned"]["answer"] is None for sample in samples_of(run))


def test_a_wrong_name_is_refused_before_the_work(said):
    folder, run, _ = said
    with pytest.raises(UsageError, match="perplexity"):
        evaluate(run, with_test(run, folder, metrics=["perplexty"]))
    with pytest.raises(UsageError, match="accuracy"):
        evaluate(run, with_test(run, folder), wanted=["acuracy"])


def test_limits():
    result = {
        "metrics": {"accuracy": {"tuned": 0.8}, "loss": {"tuned": 2.0}, "f1": {"tuned": None}},
        "forgetting": {"en": {"ratio": 1.1}, "zh": {"ratio": 1.6}},
    }
    gates.check(result, {"accuracy": 0.8, "loss": 2.0, "forgetting": 1.6})
    for name, limit in (("accuracy", 0.81), ("loss", 1.9), ("forgetting", 1.5), ("f1", 0.0)):
        with pytest.raises(Exception, match=name) as caught:
            gates.check(result, {name: limit})
        assert caught.value.exit_code == 5
    for text in ("accuracy", "accuracy=high"):
        with pytest.raises(UsageError, match="measure=number"):
            gates.parse([text])


def test_texts_are_judged_by_overlap(tmp_path, tiny):
    rows = [{"instruction": f"Say {word}.", "output": f"{word} 好的"} for word in ("one", "two", "three", "four")]
    _, result = judged(tmp_path, tiny, rows, train={"steps": 2})
    assert {"exact_match", "rouge1", "rouge2", "rougeL", "bleu"} <= set(result["metrics"])
    assert "labels" not in result


def test_labels_that_are_written_out_are_labels_however_few(tmp_path, tiny):
    _, result = judged(tmp_path, tiny, REVIEWS[:4], data={"prompt": "Review: {text}"}, train={"steps": 1})
    assert result["labels"] == ["bad", "good"] and "accuracy" in result["metrics"]


def test_figures_that_are_no_numbers_are_told_and_not_judged():
    import numpy as np

    from peft_run.evaluate.results import compared
    from peft_run.metrics.table import METRICS

    found = compared(METRICS["loss"], {"tuned": np.array([[np.nan, 1.0]] * 3), "base": np.array([[2.0, 1.0]] * 3)})
    assert found["tuned"] is None and found["p"] is None and found["verdict"] == "unclear" and found["base"] == 2
    json.dumps(found, allow_nan=False)


def test_plain_text_has_a_perplexity(tmp_path, tiny):
    rows = [{"text": f"{word} is a word and goes on for a while"} for word in ("one", "two", "three")]
    _, result = judged(tmp_path, tiny, rows, train={"steps": 2}, data={"max_length": 16})
    assert list(result["metrics"]) == ["loss", "perplexity"]


def test_a_classifier_is_held_against_an_untrained_head(tmp_path, tiny):
    run, result = judged(tmp_path, tiny, REVIEWS, task="seq_cls", train={"epochs": 10})
    assert result["base"] == "untrained_head" and result["metrics"]["accuracy"]["tuned"] == 1
    assert any(note["note"] == "evaluate.untrained_head" for note in result["notes"])
    assert "perplexity" not in result["metrics"] and result["forgetting"] == {}
    for sample in samples_of(run):
        assert sum(sample["tuned"]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert sample["tuned"]["answer"] == sample["reference"]


def test_entities_are_found_as_a_whole(tmp_path, tiny):
    run, result = judged(tmp_path, tiny, TAGGED, task="token_cls", train={"epochs": 30, "lr": 2e-2})
    assert result["metrics"]["entity_f1"]["tuned"] > 0.8
    (first, *_) = samples_of(run)
    assert len(first["tuned"]["answer"]) == 5
    for entity in first["tuned"]["entities"]:
        assert entity["tokens"] == first["prompt"].split()[entity["start"] : entity["end"]]


def test_an_answer_is_a_piece_of_the_text(tmp_path, tiny):
    run, result = judged(
        tmp_path,
        tiny,
        QUESTIONS,
        task="qa",
        train={"epochs": 30, "lr": 2e-2},
        data={"max_length": 40},
    )
    assert result["metrics"]["f1"]["tuned"] > result["metrics"]["f1"]["base"]
    for sample in samples_of(run):
        assert sample["tuned"]["answer"] and sample["tuned"]["answer"] in sample["prompt"]


def test_an_encoder_decoder_writes(tmp_path, tiny_t5):  # noqa: F811
    rows = [{"document": f"long {word} text", "summary": word} for word in "abcd" for _ in range(4)]
    _, result = judged(tmp_path, tiny_t5, rows, task="seq2seq", train={"epochs": 20, "lr": 2e-2})
    assert result["metrics"]["accuracy"]["tuned"] > result["metrics"]["accuracy"]["base"]
    assert result["metrics"]["loss"]["verdict"] == "better"


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_preference_is_a_reward(tmp_path, tiny, name):
    _, result = judged(tmp_path, tiny, PAIRS, task=name, train={"epochs": 6, "lr": 5e-3})
    assert result["metrics"]["reward_accuracy"]["tuned"] == 1
    assert "base" not in result["metrics"]["reward_accuracy"]
    if name == "dpo":
        assert result["metrics"]["margin"]["verdict"] == "better"


def test_a_fully_trained_model_is_held_against_the_base_from_its_folder(tmp_path, tiny):
    _, result = judged(tmp_path, tiny, SAYS, adapter={"method": "full"}, train={"steps": 3, "lr": 1e-3})
    assert result["base"] == "separate"
    other = tmp_path / "lora"
    other.mkdir()
    _, off = judged(other, tiny, SAYS, train={"steps": 1})
    assert result["metrics"]["loss"]["base"] == pytest.approx(off["metrics"]["loss"]["base"], rel=1e-5)


def test_without_held_out_rows_there_is_nothing_to_judge(tmp_path, tiny):
    run, _ = train_one(tmp_path, tiny, SAYS, data={"eval": {"split": 0}}, train={"steps": 1})
    with pytest.raises(UsageError, match=r"data\.test"):
        evaluate(run)


def test_the_command(tmp_path, tiny, capsys, monkeypatch):
    from peft_run.cli import main

    recipe = recipe_for(tmp_path, tiny, REVIEWS, task="seq_cls", train={"steps": 2})
    run = Run.create(recipe)
    train(run, recipe)
    write(tmp_path / "test.jsonl", REVIEWS[:6])
    monkeypatch.chdir(tmp_path)
    options = ["runs/test", "--data", "test.jsonl", "--lang", "zh"]
    capsys.readouterr()
    assert main(["evaluate", *options, "--json", "--fail-under", "accuracy=0"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["runs"]
    assert result["samples"] == 6 and result["source"] == "test"
    assert "最好的样本" in (run / "evaluation.html").read_text(encoding="utf-8")
    assert main(["eval", *options, "--fail-under", "accuracy=1.1"]) == 5
    shown = capsys.readouterr()
    assert "macro_f1" in shown.out and "accuracy" in shown.err.splitlines()[-1]
    assert main(["evaluate", "runs/test", "data.max_length=64", "--lang", "en"]) == 2
    assert "data.max_length" in capsys.readouterr().err
