"""Files of all kinds become the samples that were meant, or are refused in one line."""

from __future__ import annotations

import csv
import io
import json
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_run.config import build
from peft_run.data.dataset import key_of, load_dataset, split
from peft_run.data.detect import KINDS, detect
from peft_run.data.formats import FORMATS, BadRow
from peft_run.data.read import decoded, read
from peft_run.errors import RunError, UsageError

WILD = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
CHINESE = "房间很干净，服务也好。下次还来！"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "utf-32"])
def test_encodings_are_told_apart_by_the_bytes(tmp_path, encoding):
    path = tmp_path / "file.csv"
    path.write_bytes(f"评论,标签\n{CHINESE * 3},1\n".encode(encoding))
    assert read(path) == [{"评论": CHINESE * 3, "标签": "1"}]


def test_bytes_of_no_known_encoding_are_refused(tmp_path):
    path = tmp_path / "file.csv"
    path.write_bytes("text,label\ncafé au lait,1\n".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        read(path)
    assert decoded(path, "latin-1")[0].startswith("text,label\ncafé")


@WILD
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from(",\t;"))
def test_what_the_csv_module_writes_is_read_back(tmp_path, rows, delimiter):
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return
    path = tmp_path / "file.csv"
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows([("text", "label"), *rows])
    path.write_bytes(buffer.getvalue().encode("utf-8"))
    assert [tuple(row.values()) for row in read(path)] == rows


@WILD
@given(st.binary(max_size=300), st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "xlsx", "parquet"]))
def test_wild_bytes_give_rows_or_one_error_of_ours(tmp_path, data, kind):
    path = tmp_path / f"file.{kind}"
    path.write_bytes(data)
    try:
        rows = read(path)
    except RunError as error:
        assert "\n" not in error.tell("zh").strip() or "problem" in error.values
        return
    assert rows and all(isinstance(row, dict) for row in rows)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=True) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
COLUMNS = sorted({name for f in FORMATS.values() for names in (f.required, f.optional) for name in names})


@WILD
@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=6), min_size=1, max_size=3),
    st.sampled_from(list(KINDS)),
)
@example([{"prompt": [], "completion": [], "history": True}], "causal_lm")
def test_wild_rows_give_samples_or_one_error_of_ours(rows, task):
    try:
        found = detect(rows, task)
    except UsageError:
        return
    for row in rows:
        try:
            sample = found.format.sample(found.fields(row))
        except BadRow:
            continue
        assert isinstance(sample, dict)


ROWS = {
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "causal_lm"),
    "messages": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "causal_lm"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "causal_lm"),
    "prompt_completion": ({"问题": "a", "答案": "b"}, "causal_lm"),
    "text": ({"text": "a"}, "causal_lm"),
    "classification": ({"评论": "a", "标签": "好"}, "seq_cls"),
    "token_tags": ({"tokens": ["a"], "ner_tags": ["O"]}, "token_cls"),
    "extractive_qa": ({"question": "a", "context": "bc", "answers": {"text": ["c"], "answer_start": [1]}}, "qa"),
    "seq2seq": ({"正文": "a", "摘要": "b"}, "seq2seq"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo"),
    "rated": ({"prompt": "a", "completion": "b", "label": True}, "kto"),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_recognised_also_from_a_csv(name):
    row, task = ROWS[name]
    for shape in (row, {k: json.dumps(v) if isinstance(v, list | dict) else str(v) for k, v in row.items()}):
        found = detect([shape], task)
        assert found.format.name == name
        assert found.format.sample(found.fields(shape)) == found.format.sample(found.fields(row))


def test_two_forms_of_chat_give_the_same_messages():
    samples = []
    for name in ("messages", "sharegpt", "alpaca", "prompt_completion"):
        row, task = ROWS[name]
        found = detect([row], task)
        samples.append(found.format.sample(found.fields(row)))
    assert all(sample == samples[0] for sample in samples)


def test_a_mapping_by_hand_wins_and_a_wrong_one_is_refused():
    rows = [{"text": "no", "body": "yes", "mark": "x"}]
    found = detect(rows, "seq_cls", mapping={"text": "body", "label": "mark"})
    assert found.fields(rows[0]) == {"text": "yes", "label": "x"}
    with pytest.raises(UsageError, match="no column `bodi`"):
        detect(rows, "seq_cls", mapping={"text": "bodi"})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["x", "y"])), min_size=2, max_size=60),
    st.floats(0, 0.9),
    st.integers(0, 5),
)
def test_a_split_loses_nothing_and_leaks_nothing(rows, share, seed):
    samples = [{"text": text, "pair": None, "label": label} for text, label in rows]
    train, held_out = split(samples, share, seed)
    assert sorted(map(str, train + held_out)) == sorted(map(str, samples))
    assert not {key_of(s) for s in train} & {key_of(s) for s in held_out}
    assert split(samples, share, seed) == (train, held_out)


def dataset_of(tmp_path, rows, **sections):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), **sections.pop("data", {})}
    return load_dataset(build({"data": data, **sections}, tmp_path))


def test_labels_are_named_ordered_and_checked(tmp_path):
    rows = [{"text": str(n), "label": n % 3 + 9} for n in range(12)]
    assert dataset_of(tmp_path, rows, task="seq_cls").labels == ["9", "10", "11"]
    names = {"9": "low", "10": "mid", "11": "high"}
    assert dataset_of(tmp_path, rows, task="seq_cls", data={"labels": names}).labels == ["low", "mid", "high"]
    with pytest.raises(UsageError, match="`11`"):
        dataset_of(tmp_path, rows, task="seq_cls", data={"labels": ["9", "10"]})
    with pytest.raises(UsageError, match="nothing to tell apart"):
        dataset_of(tmp_path, rows[::3], task="seq_cls")


def test_bad_rows_are_refused_with_their_numbers_or_dropped(tmp_path):
    rows = [
        {"text": "a", "label": "x"},
        {"text": "", "label": "y"},
        {"text": "b", "label": None},
        {"text": "c", "label": "y"},
    ]
    with pytest.raises(UsageError, match=r"2 rows cannot be used \(row 2, 3\): `text` is empty"):
        dataset_of(tmp_path, rows, task="seq_cls")
    dataset = dataset_of(tmp_path, rows, task="seq_cls", data={"invalid": "drop", "eval": {"split": 0}})
    assert len(dataset.train) == 2 and dataset.files["train"][0].dropped == 2


def test_a_folder_of_text_files_labels_them_by_sub_folder(tmp_path):
    for label in ("pos", "neg"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "data" / label / f"{n}.txt").write_text(f"{label} text {n}")
    dataset = load_dataset(build({"task": "seq_cls", "data": {"train": "data"}}, tmp_path))
    assert dataset.labels == ["neg", "pos"]


def test_xlsx_and_parquet_are_read_as_csv_is(tmp_path):
    openpyxl, parquet = pytest.importorskip("openpyxl"), pytest.importorskip("pyarrow.parquet")
    import pyarrow

    book = openpyxl.Workbook()
    book.active.append(["评论", "标签"])
    book.active.append([CHINESE, 1])
    book.save(tmp_path / "a.xlsx")
    assert read(tmp_path / "a.xlsx") == [{"评论": CHINESE, "标签": 1}]
    parquet.write_table(pyarrow.table({"评论": [CHINESE], "标签": [1]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"评论": CHINESE, "标签": 1}]


# -- what is learnt of a chat -----------------------------------------------------------------------------------------

CONTENT = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=12)


@pytest.fixture(scope="session")
def renderer(tiny):
    from transformers import AutoTokenizer

    from peft_run.data.render import Renderer

    return Renderer(AutoTokenizer.from_pretrained(tiny))


@WILD
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), st.sampled_from(["completions", "last"]))
def test_learnt_are_the_answers_with_their_stop_tokens_and_nothing_else(renderer, turns, train_on):
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair)]
    (item,) = renderer.items(messages, train_on)
    answers = [answer for _, answer in turns][-1 if train_on == "last" else 0 :]
    learnt = [label for label in item.labels if label != -100]
    assert renderer.tokenizer.decode(learnt) == "".join(f"{answer}<end>" for answer in answers)
    # What stands before the last answer is what generation starts from.
    start = len(item.ids) - len(renderer.tokenizer(answers[-1])["input_ids"]) - 1
    assert list(item.ids[:start]) == renderer.prompt(messages[:-1])


def test_the_chinese_models_template_is_masked_exactly(chinese):
    from transformers import AutoTokenizer

    from peft_run.data.render import Renderer

    renderer = Renderer(AutoTokenizer.from_pretrained(chinese))
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    (item,) = renderer.items([*messages, *messages])
    learnt = [label for label in item.labels if label != -100]
    assert renderer.tokenizer.decode(learnt) == "你好！<|im_end|>" * 2
    assert renderer.stop_ids() == [2]


def test_a_template_that_rewrites_history_gives_a_row_per_answer(renderer):
    import copy

    changing = copy.copy(renderer)
    changing.tokenizer = copy.deepcopy(renderer.tokenizer)
    changing.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<start>short<end>"
        "{% else %}<start>{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<start>{% endif %}"
    )
    pair = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long answer"}]
    items = changing.items([*pair, *pair])
    assert len(items) == 2
    for item in items:
        learnt = [label for label in item.labels if label != -100]
        assert changing.tokenizer.decode(learnt) == "long answer<end>"


def test_a_template_without_a_stop_token_is_refused(tmp_path, tiny):
    from test_tasks import encoded, task_for

    task = task_for(tmp_path, tiny, [{"text": "x"}], "causal_lm")
    task.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UsageError, match="no stop token"):
        encoded(task, [chat])


def test_shuffled_order_is_a_function_of_seed_and_step():
    from peft_run.train.sampler import Sampler

    lengths = [random.Random(0).randint(1, 50) for _ in range(103)]
    for grouped in (True, False):
        sampler = Sampler(lengths, batch=4, accumulate=3, seed=1, grouped=grouped)
        again = Sampler(lengths, batch=4, accumulate=3, seed=1, grouped=grouped)
        for epoch in (0, 1):
            steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
            seen = [number for step in steps for batch in sampler.batches(step) for number in batch]
            assert sorted(seen) == list(range(103))
        assert again.batches(7) == sampler.batches(7)
