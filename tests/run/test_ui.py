"""The web page in a real browser: from a CSV to an exported model, in both languages, and what a crash leaves."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import python_path

pytest.importorskip("gradio", minversion="6.7")
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow

CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None
)
if CHROMIUM is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROUTES = ("", "data", "train", "runs", "sweep", "evaluate", "chat", "export", "serve")
CSV = "评论,标签\n" + "".join(
    f"{word}{i}！,{label}\n" for i in range(12) for word, label in (("很好", "正面"), ("很差", "负面"))
)
WAIT = 300_000  # ms: shared cores, and each command imports torch

# What Gradio logs when a page is left while one of its requests is on its way.
LEFT = ("signal is aborted", "Connection errored out")


class Site:
    """A page's server as a process, and a workspace."""

    def __init__(self, folder: Path, assets: Path, *options: str) -> None:
        self.folder, self.assets, self.options = folder, assets, options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "peft_run", "ui", str(self.folder), "--port", str(self.port), "--offline"]
        environment = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "PEFT_ASSETS": str(self.assets),
            "OMP_NUM_THREADS": "1",
        }
        with open(self.folder.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen([*command, *self.options], env=environment, stderr=log, stdout=log)
        end = time.monotonic() + 300
        while True:
            try:
                return urllib.request.urlopen(self.url + "/en/", timeout=5).read()
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    self.kill()
                    pytest.fail(self.log())
                time.sleep(0.2)

    def log(self) -> str:
        return (self.folder.parent / "server.log").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("runs/*/*/status.json") if not path.parent.is_symlink())

    def end_all(self) -> None:
        self.kill()
        for began in self.folder.glob(".jobs/*/began.json"):
            if not (began.parent / "ended.json").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(began.read_text())["pid"], signal.SIGKILL)


class Browser:
    """One window, and everything in it that went wrong."""

    def __init__(self, browser, language: str, width: int = 1280) -> None:
        locale = {"en": "en-US", "zh": "zh-CN"}[language]
        self.context = browser.new_context(locale=locale, viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", self.note)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+:)(//[^/]*)?.*$", r"\1\2", request.url)))

    def note(self, message) -> None:
        if message.type == "error" and not any(text in message.text for text in LEFT):
            self.problems.append(f"{message.text} {message.location.get('url', '')}")

    def open(self, url: str):
        self.page.goto(url)
        self.page.wait_for_selector("nav.peft-top")
        return self.page

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def check(self, site: Site) -> None:
        assert not self.problems, self.problems
        assert {host for host in self.hosts if host.startswith(("http", "ws"))} == {site.url}


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def assets(tiny):
    return tiny.parent


@pytest.fixture(scope="module")
def site(assets, tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("ui") / "space", assets)
    yield made
    made.end_all()


def say(language, key, **values):
    from peft_run.messages import sentence

    return sentence(f"ui.{key}", language, **values)


def choose(page, where, text):
    """Pick an entry of a dropdown."""
    box = page.locator(f"{where} input").first
    box.click()
    page.get_by_role("option", name=text).first.click()


def fill(page, where, text):
    page.locator(f"{where} textarea, {where} input").first.fill(text)


MORE = "model.dtype=fp32\ntrain.lr=0.01\ntrain.eval_every=10\neval.generate.max_new_tokens=4\ntrack.plots=false"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_from_a_csv_to_an_exported_model(site, chromium, tmp_path, language):
    """Upload, look, train, watch, evaluate, compare, chat with two adapters, export."""
    window = Browser(chromium, language)
    csv = tmp_path / f"reviews-{language}.csv"
    csv.write_text(CSV, encoding="utf-8")

    page = window.open(f"{site.url}/{language}/data")
    page.locator("#upload input[type=file]").set_input_files(str(csv))
    page.locator("#rows", has_text="评论").wait_for()
    choose(page, "#task", "causal_lm")
    fill(page, "#prompt", "评论：{text}")
    page.locator("#show").click()
    page.locator("#preview mark", has_text="面").first.wait_for()
    assert "评论：很好" in page.locator("#preview .peft-sample").first.inner_text()
    page.locator("#keep").click()
    page.get_by_text(say(language, "mapping_kept")).wait_for()

    names = [f"one-{language}", f"two-{language}"]
    for name in names:
        page = window.open(f"{site.url}/{language}/train?data=data/reviews-{language}.csv")
        page.locator("#yaml", has_text=f"reviews-{language}.csv").wait_for()
        fill(page, "#name", name)
        fill(page, "#steps", "30")
        fill(page, "#more", MORE + ("\nadapter.r=4" if name == names[0] else ""))
        page.locator("#yaml", has_text=f"name: {name}").wait_for()
        page.locator("#yaml", has_text="eval_every: 10").wait_for()
        page.locator("#start").click()
        page.locator("#started a").wait_for()
        page = window.open(f"{site.url}/{language}/runs")
        page.wait_for_function("n => document.querySelector('#run input').value.includes(n)", arg=name)
        page.locator("#step").wait_for()
        page.locator("#summary .done").wait_for()
        page.locator("#curves polyline").first.wait_for()
        assert name in page.locator("#run input").first.input_value()
        assert len(page.locator("#curves polyline").first.get_attribute("points").split()) == 30

    page = window.open(f"{site.url}/{language}/evaluate")
    for name in names:
        choose(page, "#run", name)
        page.locator("#evaluate").click()
        page.locator("#result table").first.wait_for()
        page.locator(f"#result:has-text('{say(language, 'reference')}')").wait_for()
    page.get_by_role("tab", name=say(language, "compare"), exact=True).click()
    page.locator("#compare").click()
    page.locator("#comparison table").first.wait_for()
    assert "adapter.r" in page.locator("#comparison").inner_text()

    page = window.open(f"{site.url}/{language}/chat")
    page.locator("#runs", has_text=names[1]).wait_for()  # the list comes after the page
    page.locator("#load").click()
    page.locator("#models label", has_text="tiny").wait_for()
    fill(page, "#ask", "很好！")
    page.locator("#send").click()
    for column in range(3):  # the base and two adapters
        page.locator(f"#chat{column} .bot, #chat{column} [data-testid=bot]").first.wait_for()
    page.wait_for_timeout(1500)
    page.locator("#keep").click()
    page.get_by_text(say(language, "sample_saved", path="data/chat-samples.jsonl")).wait_for()
    saved = [json.loads(line) for line in (site.folder / "data" / "chat-samples.jsonl").read_text().splitlines()]
    assert [m["role"] for m in saved[-1]["messages"]] == ["user", "assistant"]
    assert saved[-1]["messages"][0]["content"] == "很好！"

    page = window.open(f"{site.url}/{language}/serve")
    page.locator("#curl", has_text="chat/completions").wait_for()
    page.get_by_role("button", name=say(language, "stop"), exact=True).click()
    page.locator("#servers", has_text=say(language, "no_server")).wait_for()

    page = window.open(f"{site.url}/{language}/export")
    page.wait_for_function("() => document.querySelector('#run input').value !== ''")
    fill(page, "#name", f"merged-{language}")
    page.locator("#export").click()
    page.locator("#exports", has_text=f"merged-{language}").wait_for()
    page.locator("#exports", has_text="model.safetensors").wait_for()
    assert (site.folder / "exports" / f"merged-{language}" / "merged.json").is_file()
    window.check(site)


@pytest.fixture(scope="module")
def judged(assets, tmp_path_factory):
    """A page with two runs that are trained and judged, by the command line."""
    site = Site(tmp_path_factory.mktemp("ui2") / "space", assets)
    try:
        (site.folder / "data" / "x.csv").write_text(CSV, encoding="utf-8")
        for name in ("one", "two"):
            recipe = site.folder / "recipes" / f"{name}.yaml"
            recipe.write_text(
                "model: {path: tiny, dtype: fp32}\n"
                "data: {train: ../data/x.csv, prompt: '评论：{text}'}\n"
                "eval: {generate: {max_new_tokens: 4}}\n"
                "train: {steps: 30, lr: 0.01}\n"
                f"output: {{dir: ../runs, name: {name}}}\ntrack: {{plots: false}}\n",
                encoding="utf-8",
            )
            for words in (("train", str(recipe)), ("evaluate", str(site.folder / "runs" / name / "latest"))):
                subprocess.run(
                    [sys.executable, "-m", "peft_run", *words, "--offline"],
                    env={**os.environ, "PYTHONPATH": python_path(), "PEFT_ASSETS": str(assets)},
                    check=True,
                    capture_output=True,
                )
        yield site
    finally:
        site.end_all()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_plan_sweep_vote_and_adapters_of_a_running_server(judged, chromium, language):
    window = Browser(chromium, language)

    page = window.open(f"{judged.url}/{language}/train")
    page.locator("#yaml", has_text="x.csv").wait_for()
    page.locator("#plan").click()
    page.locator(".peft-bar span").first.wait_for()
    widths = page.eval_on_selector_all(".peft-bar span", "all => all.map(one => one.getBoundingClientRect().width)")
    assert sum(widths) > 0

    page = window.open(f"{judged.url}/{language}/sweep")
    page.wait_for_function("() => document.querySelector('#recipe input').value !== ''")
    choose(page, "#recipe", "one.yaml")
    fill(page, "#axes", "train.lr=0.001,0.02")
    page.locator("#start").click()
    page.locator("#result table").first.wait_for()
    page.wait_for_function("() => /0\\.02/.test(document.querySelector('#result').innerText)")
    page.locator(".peft-state.done").wait_for()
    page.locator("#best").click()
    best = judged.folder / "recipes" / ("one-best.yaml" if language == "en" else "one-best-2.yaml")
    page.get_by_text(f"recipes/{best.name}").wait_for()
    assert "lr" in best.read_text(encoding="utf-8")

    page = window.open(f"{judged.url}/{language}/evaluate")
    page.get_by_role("tab", name=say(language, "vote"), exact=True).click()
    choose(page, "#first", "two" if language == "en" else "one")
    page.locator("#left .peft-sample").wait_for()
    assert page.locator("#question").inner_text() and page.locator("#right .peft-sample").count() == 1
    page.locator("#left_better").click()
    page.locator("#tally table").wait_for()
    page.wait_for_function("() => /\\b1\\b/.test(document.querySelector('#tally table').innerText)")
    assert (judged.folder / "votes.jsonl").read_text(encoding="utf-8").strip()

    page = window.open(f"{judged.url}/{language}/serve")
    page.locator("#runs", has_text="two").wait_for()
    page.locator("#start").click()
    page.locator("#servers td", has_text="tiny, two").wait_for()  # it is up
    page.get_by_role("button", name=say(language, "load_adapters")).click()
    page.wait_for_function("() => document.querySelector('#server input')?.value.startsWith('http')")
    choose(page, "#adapter", "one")
    page.get_by_label(say(language, "served_as")).fill("late")
    page.get_by_role("button", name=say(language, "load"), exact=True).click()
    page.locator("#servers td", has_text="late").wait_for()
    page.get_by_role("button", name=say(language, "unload"), exact=True).click()
    page.locator("#servers td", has_text="late").wait_for(state="detached")
    page.get_by_role("button", name=say(language, "stop_server"), exact=True).click()
    page.locator("#servers", has_text=say(language, "no_server")).wait_for()
    window.check(judged)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_page_is_wider_than_its_window_or_logs_an_error(site, chromium, language, width):
    window = Browser(chromium, language, width)
    for route in ROUTES:
        page = window.open(f"{site.url}/{language}/{route}")
        page.wait_for_timeout(1500)
        assert window.overflow() <= 0, route
        own = page.locator("nav.peft-top a[aria-current]").inner_text()
        assert own == say(language, f"page_{route or 'home'}")
    window.check(site)


def test_a_run_goes_on_without_browser_and_server(assets, chromium, tmp_path):
    """The curve is whole after the page was gone, and a stopped run goes on where it was."""
    site = Site(tmp_path / "space", assets)
    try:
        (site.folder / "data" / "x.csv").write_text(CSV, encoding="utf-8")
        window = Browser(chromium, "en")
        page = window.open(f"{site.url}/en/train")
        page.locator("#yaml", has_text="x.csv").wait_for()
        fill(page, "#name", "long")
        fill(page, "#steps", "1500")
        fill(page, "#more", f"{MORE}\ntrain.save_every=100")
        page.locator("#yaml", has_text="save_every: 100").wait_for()
        page.locator("#start").click()
        page = window.open(f"{site.url}/en/runs")
        page.locator("#step").wait_for()
        window.context.close()
        site.kill()
        run = site.runs()[0]
        before = len((run / "trainer_log.jsonl").read_text().splitlines())
        time.sleep(3)
        assert len((run / "trainer_log.jsonl").read_text().splitlines()) > before
        site.start()
        window = Browser(chromium, "en")
        page = window.open(f"{site.url}/en/runs")
        page.locator("#summary .running").wait_for()
        page.locator("#stop").click()
        page.locator("#summary .interrupted").wait_for()
        logged = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
        steps = [event["step"] for event in logged if "loss" in event]
        assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > before
        points = page.locator("#curves polyline").first
        page.wait_for_function(
            "n => document.querySelector('#curves polyline').getAttribute('points').trim().split(/\\s+/).length === n",
            arg=len(steps),
        )
        assert points.count() == 1
        page.locator("#resume").click()
        page.locator("#summary .running").wait_for()
        page.wait_for_function("n => Number(document.querySelector('#step')?.innerText) > n", arg=steps[-1])
        window.check(site)
    finally:
        site.end_all()


def test_files_outside_are_not_served(site, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    keys = site.folder / ".jobs" / "key.json"
    keys.write_text("secret")
    for path in ("/etc/passwd", tmp_path / "secret.txt", keys, site.folder / ".." / "server.log"):
        for language in ("en", "zh"):
            try:
                status = urllib.request.urlopen(f"{site.url}/{language}/gradio_api/file={path}", timeout=10).status
            except urllib.error.HTTPError as error:
                status = error.code
            assert status in (403, 404), path
