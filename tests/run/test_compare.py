"""`peft compare`, and an adapter against full fine-tuning."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from test_evaluate import SAYS, with_test
from test_train import train_one

from peft_run.columns import columns, width
from peft_run.compare import compare, page
from peft_run.document import Bad, Document, Good
from peft_run.errors import UsageError
from peft_run.evaluate import evaluate
from peft_run.metrics import resample
from peft_run.metrics.table import METRICS
from peft_run.svg import Line, chart, steps


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny):
    """A run that has learnt and one that has not, judged on the same samples but one."""
    folder = tmp_path_factory.mktemp("pair")
    runs = []
    for count, sample in ((40, None), (1, 19)):
        run, _ = train_one(folder, tiny, SAYS, data={"eval": {"split": 0}}, train={"steps": count, "batch": 8})
        evaluate(run, with_test(run, folder, sample=sample, forgetting="none"))
        runs.append(run)
    return runs


def test_runs_are_held_against_the_first_on_the_samples_of_both(pair):
    result = compare(pair)
    first, second = (run["name"] for run in result["runs"])
    loss = result["measures"]["loss"][second]
    assert loss["samples_in_common"] == 19 and loss["verdict"] == "worse"
    assert loss["difference"] > 0 and "difference" not in result["measures"]["loss"][first]

    rows = [[json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()] for run in pair]
    asked = [row["prompt"] for row in rows[1]]
    here = [row["tuned"]["measures"]["accuracy"] for row in rows[1]]
    there = {row["prompt"]: row["tuned"]["measures"]["accuracy"] for row in rows[0]}
    gap = sum(here) / 19 - sum(there[prompt] for prompt in asked) / 19
    assert result["measures"]["accuracy"][second]["difference"] == pytest.approx(gap)


def test_what_the_recipes_differ_in(pair):
    result = compare(pair)
    assert result["recipes"] == {"train.steps": [40, 1]}
    assert [run["steps"] for run in result["runs"]] == [40, 1]


def test_samples_stand_side_by_side(pair):
    changed = compare(pair)["samples"]["changed"]
    assert len(changed) == 5 and all(len(row["tuned"]) == 2 for row in changed)
    spreads = [row["spread"] for row in changed]
    assert spreads == sorted(spreads, reverse=True)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_needs_nothing_else(pair, tmp_path, language):
    page.write(compare(pair), pair, tmp_path / "page.html", language)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for outside in ("<script", "http://", "https://", "src=", "@import", "<link"):
        assert outside not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert text.count("<svg") == 2 and "train.steps" in text  # loss and rate: there was no held-out part
    assert ("差异最大" in text) == (language == "zh")
    start = text.index("<svg")
    ET.fromstring(text[start : text.index("</svg>") + 6])


def test_a_run_that_is_not_judged_still_has_its_training(tmp_path, tiny, pair):
    run, _ = train_one(tmp_path, tiny, SAYS, train={"steps": 1})
    result = compare([run, pair[0]])
    assert result["not_evaluated"] == [result["runs"][0]["name"]]
    assert "p" not in result["measures"]["loss"][result["runs"][1]["name"]]


def test_the_command(pair, tmp_path, capsys, monkeypatch):
    from peft_run.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["compare", *(str(run.path) for run in pair)]) == 0
    assert (tmp_path / "compare.html").is_file() and "macro_f1" in capsys.readouterr().out
    assert main(["compare", str(pair[0].path), str(pair[0].path)]) == 2
    assert main(["compare", *(str(run.path) for run in pair), "-o", "no/where.html"]) == 2


def test_an_adapter_against_full_fine_tuning(tmp_path, tiny):
    from peft_run.evaluate.full import against_full, full_recipe

    run, trained = train_one(tmp_path, tiny, SAYS, data={"eval": {"split": 0}}, train={"steps": 3, "batch": 8})
    recipe = with_test(run, tmp_path, forgetting="none")
    evaluate(run, recipe)
    result = against_full(run, recipe, with_console())
    first, second = result["runs"]
    assert second["tokens"] == first["tokens"] == trained["tokens"] and second["steps"] == 3
    assert second["trainable"] > first["trainable"]
    assert result["measures"]["loss"][second["name"]]["samples_in_common"] == 20
    kept = run.read_json("metrics.json")["against_full"]
    assert kept["lr"] == pytest.approx(1e-3) and (run / kept["run"] / "artefact.json").is_file()
    assert (run / "against_full.html").is_file()
    groups = [path for path in (tmp_path / "runs" / "test-full").iterdir() if not path.is_symlink()]
    against_full(run, recipe, with_console())  # the same training is not done twice
    assert groups == [path for path in (tmp_path / "runs" / "test-full").iterdir() if not path.is_symlink()]
    recipe.task = "dpo"
    with pytest.raises(UsageError, match="adapter"):
        full_recipe(run, recipe, None)


def with_console():
    from peft_run.console import silent

    return silent()


# -- the parts ------------------------------------------------------------------------------------------------------


def test_text_that_is_data_does_not_become_markup():
    document = Document("<b>", "zh")
    document.text("a <script>alert(1)</script> & *b*")
    document.table(["x|y"], [["<i>"], [Good("ok")], [Bad("one\ntwo|three")]])
    page, plain = document.html(), document.markdown()
    assert "<script" not in page and "<i>" not in page and 'lang="zh-CN"' in page
    assert '<td class="good">ok</td>' in page and '<td class="bad">one\ntwo|three</td>' in page
    assert "\\<script\\>" in plain and "| one two\\|three |" in plain and "| x\\|y |" in plain


def test_charts_keep_their_points():
    lines = [Line("<loss>", [(0, 1.0), (10, 0.0), (20, float("nan"))]), Line("b", [(5, 0.5)]), Line("none", [])]
    root = ET.fromstring(chart("losses", lines, "step"))
    tag = "{http://www.w3.org/2000/svg}"
    first, _ = (e.get("points") for e in root.iter(f"{tag}polyline"))
    (x0, y0), (x1, y1) = (tuple(map(float, part.split(","))) for part in first.split())
    assert x1 > x0 and y1 > y0  # to the right, and down
    assert [e.text for e in root.iter(f"{tag}text")].count("<loss>") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 250), (1e-5, 2e-4), (0.999, 1.001), (2, 2)])
def test_ticks_are_round_and_around(low, high):
    found = steps(low, high)
    assert 2 <= len(found) <= 11 and found[0] <= low and high <= found[-1] + 1e-9


def test_columns_line_up_with_chinese():
    lines = columns([["标签", "x"], ["ab", "好"], ["", "é"]]).split("\n")
    assert [width(line[: line.index(mark)]) for line, mark in zip(lines, "x好é")] == [6, 6, 6]


def test_a_difference_is_the_same_from_both_sides():
    import numpy as np

    rng = np.random.default_rng(1)
    a, b = (np.stack([rng.random(50), np.ones(50)], 1) for _ in range(2))
    value = METRICS["loss"].value
    low, high = resample.difference(a, b, value)
    assert resample.difference(b, a, value) == pytest.approx((-high, -low))
    assert resample.chance(a, b, value) == pytest.approx(resample.chance(b, a, value), abs=0.02)
