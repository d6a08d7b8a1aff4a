"""The documents: their code runs, in order, on small stand-ins for the names it uses; their links and files exist."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from pathlib import Path

import pytest
from helpers import ROOT, chat_llama, tiny_tokenizer
from test_seed_scripts import tiny_gpt2, wikitext

from peft import layers, quant, registry
from peft.errors import PeftWarning

DOCUMENTS = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"])
RUNNABLE = [path for path in DOCUMENTS if "```python\n" in path.read_text(encoding="utf-8")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # "```python notest" is an excerpt
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
FILE = re.compile(r"`([\w./-]+\.(?:py|md|json|txt))`")
MADE = {"adapter_stack.json", "adapter_config.json", "adapter_provenance.json", "runs/demo/metrics.json", "config.json"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def blocks(document: Path) -> list[tuple[int, str]]:
    """(line, code) of the blocks that are to run."""
    text = document.read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """{name in the documents: folder} of tiny models and a text."""
    made = tmp_path_factory.mktemp("stand-ins")
    for name, model in [("llama", chat_llama()), ("gpt2", tiny_gpt2())]:
        model.save_pretrained(made / name)
        tiny_tokenizer().save_pretrained(made / name)
    wikitext(made / "wikitext")
    return {
        "HuggingFaceTB/SmolLM2-135M-Instruct": made / "llama",
        "your-base-model-name": made / "llama",
        "gpt2": made / "gpt2",
        "Salesforce/wikitext": made / "wikitext",
    }


@pytest.fixture
def place(stand_ins, tmp_path, monkeypatch):
    """A folder to run in; tables of the package that a document adds to are put back."""
    for name, folder in stand_ins.items():
        link = tmp_path / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    kinds, types, backends = layers.KINDS.copy(), layers._by_type.copy(), quant.BACKENDS.copy()
    yield
    layers.KINDS[:], quant.BACKENDS[:] = kinds, backends
    layers._by_type.clear()
    layers._by_type.update(types)
    for name in set(registry._METHODS) - set(registry.BUILT_IN):
        del registry._METHODS[name]


@pytest.mark.parametrize("document", RUNNABLE, ids=name_of)
def test_code_runs(document, place):
    namespace = {"__name__": "__main__"}
    for line, code in blocks(document):
        tree = compile("\n" * line + code, str(document), "exec", dont_inherit=True)  # tracebacks name the line
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            exec(tree, namespace)


@pytest.mark.parametrize("translated", [d for d in DOCUMENTS if d.name.endswith(".zh.md")], ids=name_of)
def test_both_languages_show_the_same_code(translated):
    english, chinese = blocks(translated.with_name(translated.name.replace(".zh", ""))), blocks(translated)
    assert [ast.dump(ast.parse(code)) for _, code in english] == [ast.dump(ast.parse(code)) for _, code in chinese]


def anchors(text: str) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each
def test_links_lead_somewhere(document):
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        path = (document.parent / target) if target else document
        assert path.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor[1:] in anchors(path.read_text(encoding="utf-8")), f"{document.name}: {target}{anchor}"


@functools.cache
def files() -> list[str]:
    """The files of the repository that a document may name."""
    found = [path for top in ("src", "tests", "docs") for path in (ROOT / top).rglob("*.*")]
    found += [*ROOT.glob("*.*"), *ROOT.glob("benchmarks/*.*")]
    return [f"/{name_of(path)}" for path in found]


@each
def test_named_files_exist(document):
    here = files()
    for name in set(FILE.findall(document.read_text(encoding="utf-8"))) - MADE:
        assert any(path.endswith(f"/{name}") for path in here), f"{document.name}: {name}"


def test_the_tests_of_the_table_exist():
    for path in re.findall(r"tests/[\w/]+(?:\.py)?", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
