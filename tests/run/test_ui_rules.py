"""What the web page may touch and who may see it: the workspace's paths, recipes, the gate, blind votes."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_run import ui
from peft_run.compare import votes
from peft_run.config import build
from peft_run.errors import RunError, UsageError
from peft_run.ui import drafts
from peft_run.ui.app import ROUTES
from peft_run.ui.workspace import Workspace

pytest.importorskip("starlette")

from peft_run.ui.gate import COOKIE, Gate


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """With links that lead out, and one that stays inside."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.txt").write_text("x")
    space = Workspace(tmp_path_factory.mktemp("place") / "space")
    (space.root / "data" / "out").symlink_to(outside)
    (space.root / "data" / "file.csv").symlink_to(outside / "secret.txt")
    (space.root / "data" / "real.csv").write_text("text,label\na,1\n")
    (space.root / "data" / "in").symlink_to(space.root / "runs")
    (space.root / ".jobs" / "key.json").write_text("{}")
    space.outside = outside
    return space


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "..",
                ".",
                "",
                "/",
                "//",
                "~",
                "data",
                "out",
                "in",
                "file.csv",
                "real.csv",
                ".jobs",
                "key.json",
                "C:",
                "\\",
            ]
        ),
        st.text(max_size=6),
        st.sampled_from(["\0", "a\0b", "\ud800", "%2e%2e", "a" * 300]),
    ),
    max_size=8,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PIECES, st.sampled_from(["/", "", "\\"]), st.sampled_from(["relative", "root", "absolute", "outside"]))
@example(["data", "out", "secret.txt"], "/", "relative")
@example(["data", "..", "..", "x"], "/", "relative")
@example([".jobs", "key.json"], "/", "root")
@example(["secret.txt"], "/", "outside")
def test_no_path_leads_out_of_the_workspace(workspace, pieces, joint, start):
    before = {"relative": "", "root": f"{workspace.root}/", "absolute": "/", "outside": f"{workspace.outside}/"}
    given_path = before[start] + joint.join(pieces)
    try:
        path = workspace.inside(given_path)
    except UsageError:
        return
    assert os.path.realpath(path) == str(path)  # no link is left in it
    inner = path.relative_to(workspace.root)
    assert not any(part.startswith(".") for part in inner.parts)


def test_what_is_inside_is_found(workspace):
    assert workspace.inside("data/real.csv") == workspace.root / "data" / "real.csv"
    assert workspace.inside(workspace.root / "data" / "in") == workspace.root / "runs"
    assert workspace.name(workspace.inside("data/../runs")) == "runs"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        " ",
        "..",
        "/etc/passwd",
        "data/out/secret.txt",
        "data/file.csv",
        ".jobs/key.json",
        "data/\0",
        "\0",
        "a/../../b",
    ],
)
def test_what_is_refused(workspace, wrong):
    with pytest.raises(UsageError, match="not in the workspace"):
        workspace.inside(wrong)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200))
@example("../../etc/cron.d/x.csv")
@example(".hidden.csv")
@example("C:\\Users\\x\\评论 表.csv")
@example("\ud800.csv")
def test_names_of_uploads_are_plain(workspace, name):
    place = workspace.new("data", name)
    assert place.parent == workspace.root / "data" and not place.exists() and not place.name.startswith((".", "-"))


def recipe(workspace, **sections):
    raw = {"data": {"train": "data/real.csv"}, "model": {"path": "some/model"}, **sections}
    return build(raw, workspace.root)


def test_recipes_that_lead_out_are_refused(workspace, monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_ASSETS", raising=False)
    workspace.check(recipe(workspace))
    for section in (
        {"data": {"train": "/etc/passwd"}},
        {"data": {"train": "data/out/secret.txt"}},
        {"data": {"train": "data/real.csv", "eval": {"path": "../x.csv"}}},
        {"data": {"train": "data/real.csv", "test": "~/x.csv"}},
        {"data": {"train": "data/real.csv", "template": "/etc/passwd"}},
        {"eval": {"forgetting": "data/file.csv"}},
        {"output": {"dir": "/tmp"}},
        {"model": {"path": str(tmp_path)}},
        {"model": {"path": "../model"}},
        {"model": {"path": "data/out"}},
        {"model": {"path": "some/model", "tokenizer": "/tmp"}},
        {"model": {"path": "some/model", "trust_remote_code": True}},
    ):
        with pytest.raises(UsageError):
            workspace.check(recipe(workspace, **section))
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("PEFT_ASSETS", str(tmp_path))
    workspace.check(recipe(workspace, model={"path": "base"}))
    workspace.check(recipe(workspace, model={"path": str(tmp_path / "base")}))


def test_the_train_page_writes_the_recipe_that_it_shows(workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)
    values = {"task": "causal_lm", "model": "some/model", "data": "data/real.csv", "prompt": "a: {text}", "lr": 3e-5}
    workspace.note_mapping("data/real.csv", {"format": "classification", "map": {"text": "text", "label": "label"}})
    made = drafts.make(workspace, None, "one", values, "train.seed=7\nadapter.target=[q_proj]")
    again = drafts.load(drafts.save(workspace, made))
    assert again.data.train[0].map == {"text": "text", "label": "label"} and again.data.prompt == "a: {text}"
    assert (again.train.lr, again.train.seed, again.adapter.target) == (3e-5, 7, ["q_proj"])
    assert again.at(again.data.train[0].path) == workspace.root / "data" / "real.csv"
    assert again.at(again.output.dir) == workspace.root / "runs"
    with pytest.raises(UsageError):
        drafts.make(workspace, None, "../x", values, "")
    with pytest.raises(UsageError):
        drafts.make(workspace, None, "x", values, "output.dir=/tmp")
    other = drafts.make(workspace, None, "one", {**values, "lr": 1e-3}, "")
    assert drafts.place_for(workspace, other).name == "one-2.yaml"  # nobody's recipe is overwritten


def test_a_ready_recipe_comes_with_its_data(workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)
    file = drafts.start(workspace, "zh-sentiment")
    values = drafts.values_of(drafts.load(file), workspace)
    assert values["data"] == "recipes/zh-sentiment/reviews.csv" and values["bits"] is None
    made = drafts.make(workspace, file, "zh", {**values, "steps": 3}, "")
    assert made.train.steps == 3 and made.data.prompt == values["prompt"]
    again = drafts.load(drafts.save(workspace, made))
    assert again.at(again.data.train[0].path).is_file()


# -- the gate ---------------------------------------------------------------------------------------------------------


PAGE = b'<html><head><script src="https://elsewhere.example/x.js" async></script><link rel="preconnect" '
PAGE += b"href='https://fonts.example'><script src='./own.js'></script></head></html>"


async def pages(scope, receive, send):
    headers = [(b"content-type", b"text/html"), (b"content-length", str(len(PAGE)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": PAGE})


def browser(host="127.0.0.1", secret=None, url="http://127.0.0.1:7860"):
    from starlette.testclient import TestClient

    return TestClient(Gate(pages, host, secret), base_url=url, follow_redirects=False)


def test_on_loopback_only_own_names_and_own_forms_are_answered():
    assert browser().get("/en/").status_code == 200
    assert browser(url="http://localhost:7860").get("/").status_code == 200
    assert browser(url="http://evil.example:7860").get("/").status_code == 403  # a name that leads here
    assert browser().post("/en/x", headers={"origin": "http://evil.example"}).status_code == 403
    assert browser().post("/en/x", headers={"origin": "null"}).status_code == 403
    assert browser().post("/en/x", headers={"origin": "http://127.0.0.1:7860"}).status_code == 200


def test_pages_fetch_nothing_from_elsewhere():
    answer = browser().get("/en/")
    assert b"http" not in answer.content and b"./own.js" in answer.content
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/en/", "/en/gradio_api/queue/data", "/zh/gradio_api/file=/etc/passwd", "//x"])
def test_other_addresses_need_the_secret(path, monkeypatch):
    monkeypatch.setattr("peft_run.ui.gate.WRONG_SECONDS", 0)
    client = browser("0.0.0.0", "s3cret", "http://10.0.0.5:7860")
    assert client.get(path).status_code == 401 and client.post(path).status_code == 401
    assert client.get(path, params={"token": "wrong"}).status_code == 401
    assert client.get(path, headers={"cookie": f"{COOKIE}=x"}).status_code == 401
    assert client.get(path, headers={"cookie": f"{COOKIE}=\xe9;=".encode("latin-1")}).status_code == 401


def test_the_secret_opens_by_link_and_by_form(monkeypatch):
    monkeypatch.setattr("peft_run.ui.gate.WRONG_SECONDS", 0)
    client = browser("0.0.0.0", "s3cret", "http://10.0.0.5:7860")
    answer = client.get("/en/runs", params={"token": "s3cret", "run": "a b"})
    assert answer.status_code == 303 and answer.headers["location"] == "/en/runs?run=a+b"
    assert "HttpOnly" in answer.headers["set-cookie"] and "s3cret" not in answer.headers["set-cookie"]
    assert client.get("/en/runs").status_code == 200  # the client keeps the cookie
    fresh = browser("0.0.0.0", "s3cret", "http://10.0.0.5:7860")
    form = fresh.get("/", headers={"accept": "text/html", "accept-language": "zh-CN"})
    assert form.status_code == 401 and "密码" in form.text
    assert fresh.post("/login", data={"secret": "wrong"}).status_code == 401
    assert fresh.post("/login", data={"secret": "s3cret"}).status_code == 303
    assert fresh.get("/en/").status_code == 200
    away = browser("0.0.0.0", "s3cret", "http://10.0.0.5:7860").get("//evil.example/", params={"token": "s3cret"})
    assert away.headers["location"].startswith("/") and not away.headers["location"].startswith("//")


def test_the_command_refuses_other_addresses_without_a_secret(peft, tmp_path):
    pytest.importorskip("gradio")
    refused = peft("ui", tmp_path, "--host", "0.0.0.0", PEFT_UI_TOKEN="")
    assert refused.returncode == 2 and "--token" in refused.stderr


# -- blind votes ------------------------------------------------------------------------------------------------------


def entry(answers):
    rows = [
        {"key": k, "prompt": k, "reference": "r", "tuned": {"answer": t}, "base": {"answer": b}} for k, t, b in answers
    ]
    return SimpleNamespace(rows=rows, places={(row["key"], 1): i for i, row in enumerate(rows)})


def test_only_samples_with_different_answers_are_voted_on():
    one, two = entry([("a", "x", "y"), ("b", "x", "x"), ("c", "z", "q")]), entry([("c", "z", "q"), ("a", "w", "y")])
    assert [(b.key, b.answers) for b in votes.ballots(one, None)] == [("a-1", ("x", "y")), ("c-1", ("z", "q"))]
    assert [(b.key, b.answers) for b in votes.ballots(one, two)] == [("a-1", ("x", "w"))]


def test_votes_are_counted_whichever_side_was_named_first(tmp_path):
    file = tmp_path / "votes.jsonl"
    assert votes.read(file, ["p", "q"]) == {}
    for key, winner in (("1", "p"), ("2", "q"), ("2", "p"), ("3", "same")):
        votes.add(file, ["p", "q"], key, winner)
    votes.add(file, ["p", "other"], "1", "other")
    assert len(file.read_text().splitlines()) == 5 and json.loads(file.read_text().splitlines()[0])["for"] == "p"
    given = votes.read(file, ["q", "p"])
    assert votes.tally(given, ["p", "q"]) == {"votes": {"p": 2, "q": 0, "same": 1}, "p": 0.5}
    assert votes.sign_test(5, 5) == 1 and votes.sign_test(0, 10) == pytest.approx(2 / 1024)


# -- sentences, and what a sweep may be told


def test_every_sentence_that_the_page_asks_for_is_there():
    from peft_run.messages.ui import TABLE

    files = [*Path(ui.__file__).parent.rglob("*.py"), Path(ui.__file__).parents[1] / "commands" / "ui.py"]
    pattern = re.compile(r"""(?:say\(\s*["']|"ui\.)([a-z_]+)["']""")
    asked = {key for file in files for key in pattern.findall(file.read_text(encoding="utf-8"))}
    states = ("new", "starting", "running", "done", "failed", "interrupted", "lost", "gone")
    asked |= {f"state_{name}" for name in states} | {f"page_{route or 'home'}" for route in ROUTES}
    assert len(asked) > 100 and sorted(key for key in asked if f"ui.{key}" not in TABLE) == []


def test_a_sweep_is_told_of_the_method_and_the_training_only(monkeypatch, workspace):
    pytest.importorskip("gradio")
    from peft_run.ui.pages.sweep import axes_of, options_of

    assert axes_of("adapter.r=4,8\n\n lora_alpha=8,16 ") == ["--axis", "adapter.r=4,8", "--axis", "lora_alpha=8,16"]
    assert options_of("--trials 8 --search=random") == ["--trials", "8", "--search", "random"]
    for line in ("output.dir=/tmp", "output_dir=/tmp", "data.train=/etc/passwd", "model.path=/x", "--train-file=/x"):
        with pytest.raises(RunError):
            axes_of(line)
    for text in ("-o /tmp", "--storage sqlite:///x", "--output.dir=/tmp", "data.train=/x"):
        with pytest.raises(RunError):
            options_of(text)


def test_the_preview_marks_exactly_what_is_learnt(tiny, tmp_path):
    from peft_run.console import silent
    from peft_run.data.dataset import load_dataset
    from peft_run.data.preview import preview, segments
    from peft_run.train.stage import make_task

    (tmp_path / "chats.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n')
    recipe = build({"model": {"path": str(tiny)}, "data": {"train": "chats.jsonl", "eval": {"split": 0}}}, tmp_path)
    task = make_task(recipe, [])
    (item,) = task.encode_all(load_dataset(recipe).train, silent(), training=False)
    pieces = segments(item, task.tokenizer)
    assert [text for text, learnt in pieces if learnt] == ["a<end>"] and "Say a." in pieces[0][0]
    assert preview(item, task.tokenizer, colour=False) == pieces[0][0] + "⟦a<end>⟧"


def test_the_memory_plan_is_drawn_to_scale():
    pytest.importorskip("gradio")
    from peft_run.messages import sentence
    from peft_run.ui import plan
    from peft_run.ui.command import Answer

    page = SimpleNamespace(say=lambda key, **values: sentence(f"ui.{key}", "en", **values))
    lora = dict.fromkeys(plan.PARTS, 10 << 20) | {"peak": 50 << 20}
    full = dict.fromkeys(plan.PARTS, 40 << 20) | {"peak": 200 << 20}
    result = {"method": "lora", "room": 100 << 20, "plans": {"full": full, "lora": lora}, "largest": {"batch": 3}}
    drawn = plan.shown(page, Answer(0, result, ""))
    assert drawn.index("<b>lora</b>") < drawn.index("<b>full</b>")  # the recipe's own comes first
    assert 'class="good">50 MiB / 100 MiB' in drawn and 'class="bad">200 MiB / 100 MiB' in drawn
    assert drawn.count("width:5.00%") == 5 and drawn.count("width:20.00%") == 5
    assert "too big" in plan.shown(page, Answer(4, result, "too big"))
    assert plan.shown(page, Answer(2, None, "<no>")) == '<p class="peft-error">&lt;no&gt;</p>'
