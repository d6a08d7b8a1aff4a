"""Recipes: what is accepted, what is refused, and that what is saved says the same."""

from __future__ import annotations

import json

import pytest
import yaml

from peft_run import recipes
from peft_run.config import build, dump, load
from peft_run.config.aliases import ALIASES, IN_SECTION
from peft_run.config.describe import json_schema, names
from peft_run.config.help import HELP
from peft_run.config.schema import Recipe
from peft_run.data.dataset import load_dataset
from peft_run.errors import UsageError
from peft_run.run import Run


def test_every_field_is_explained_in_both_languages():
    assert set(HELP) == set(names())
    assert all(len(texts) == 2 and all(texts) for texts in HELP.values())


def test_every_alias_leads_to_a_field():
    known = set(names())
    assert not [name for name in ALIASES.values() if name not in known]
    assert not [f"{s}.{n}" for s, table in IN_SECTION.items() for n in table.values() if f"{s}.{n}" not in known]


def test_the_schema_describes_every_field():
    text = json.dumps(json_schema("zh"), ensure_ascii=False)
    assert all(json.dumps(texts[1], ensure_ascii=False) in text for texts in HELP.values())


def test_names_of_other_tools_and_overrides_are_understood(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "base_model: org/name\nlora_r: 4\nload_in_4bit: true\nlora_target: all\n"
        "train: {learning_rate: 1e-4, batch: 2}\ndata: {train: a.csv}\n"
    )
    recipe = load(
        path, ["train.lr=3e-5", "lora_alpha=8", "cutoff_len=99", "data.train.0.format=text", "model.quant=null"]
    )
    assert (recipe.model.path, recipe.adapter.r, recipe.adapter.target) == ("org/name", 4, "all-linear")
    assert (recipe.train.lr, recipe.train.batch, recipe.adapter.alpha) == (3e-5, 2, 8)
    assert (recipe.data.max_length, recipe.data.train[0].format, recipe.model.quant) == (99, "text", None)
    assert load(path).model.quant.bits == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trian: {lr: 1}", "did you mean `train`"),
        ("train: {learning: 1}", "unknown key `train.learning`"),
        ("adapter: {lr: 1}", "did you mean `train.lr`"),
        ("train: {lr: fast}", "`train.lr`"),
        ("train: {lr: -1}", "greater than 0"),
        ("train: {lr: .nan}", "`train.lr`"),
        ("train: {batch: 0}", "`train.batch`"),
        ("task: painting", "`task`"),
        ("version: 2", "`version`"),
        ("output: {name: ../../etc}", "output.name"),
        ("train: [1, 2]", "`train`"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("train: {lr: 1}\ntrain: {lr: 2}", "twice"),
        ("- 1", "found list"),
        ("task: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, says):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        load(path)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_saved_recipe_means_the_same_from_its_new_place(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data.jsonl").write_text('{"text": "a"}\n')
    recipe_file = tmp_path / "project" / "recipe.yaml"
    recipe_file.write_text("model: {path: org/name}\ndata: {train: data.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load("project/recipe.yaml", ["train.lr=1e-3"])
    run = Run.create(recipe, given=recipe_file)
    again = run.recipe
    assert again.model.path == "org/name"
    assert again.at(again.data.train[0].path) == tmp_path / "project" / "data.jsonl"
    assert again.at(again.output.dir) == recipe.at(recipe.output.dir)
    assert run.path.parent == tmp_path / "project" / "runs" / "recipe"
    (tmp_path / "project").rename(tmp_path / "moved")
    moved = Run.open(tmp_path / "moved" / "runs" / "recipe").recipe
    assert moved.at(moved.data.train[0].path) == tmp_path / "moved" / "data.jsonl"
    changed = {"train": {"lr"}, "output": {"name"}}
    plain = build({"model": {"path": "org/name"}, "data": {"train": "data.jsonl"}}, tmp_path)
    assert yaml.safe_load(dump(recipe))["train"]["lr"] == 1e-3
    for section in Recipe.model_fields:
        if section not in (*changed, "version", "task", "data"):
            assert getattr(recipe, section) == getattr(plain, section), section


def test_an_override_of_a_path_starts_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("data: {train: x.csv}")
    (tmp_path / "here.csv").write_text("text\na\n")
    monkeypatch.chdir(tmp_path)
    recipe = load("recipes/r.yaml", ["data.train=here.csv"])
    assert recipe.at(recipe.data.train[0].path) == tmp_path / "here.csv"


@pytest.mark.parametrize("name", recipes.names())
def test_ready_recipes_are_valid_and_small(tmp_path, name):
    files = recipes.copy(name, tmp_path / name)
    assert {"recipe.yaml", "guide.md", "guide.zh.md"} <= {path.name for path in files}
    for path in (tmp_path / name).glob("*.yaml"):
        dataset = load_dataset(load(path))
        assert dataset.train and dataset.eval
        assert len(dataset.train) + len(dataset.eval) <= 100
        assert dataset.duplicates == dataset.leaked == 0
    with pytest.raises(UsageError, match="exists already"):
        recipes.copy(name, tmp_path / name)
