"""The command line, the converted model, and one short run of `peft demo`."""

import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from peft_run import cli
from peft_run.errors import MissingPackage
from peft_run.gguf_llama import unpermute_rope_rows
from peft_run.messages import LANGUAGES
from peft_run.messages.demo import TABLE
from peft_run.models import smollm2
from peft_run.packages import package_file
from peft_run.reviews import load_reviews
from peft_run.training import train


def test_help_lists_the_commands_and_loads_nothing_heavy():
    script = (
        "import sys; from peft_run.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "demo" in shown.stdout


@pytest.mark.parametrize("arguments", [["dmeo"], ["demo", "--steps", "0"], ["demo", "--no-such-option"]])
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    if arguments == ["dmeo"]:
        assert "`demo`" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("peft ")


def test_a_missing_package_exits_with_3_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 3
    assert "pip install 'peft[demo]'" in capsys.readouterr().err


def test_a_file_of_a_package_is_found_without_running_the_package(tmp_path, monkeypatch):
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    (package / "data.txt").write_text("here")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_file("explosive_package", "*.txt", extra="demo") == package / "data.txt"


def test_every_message_exists_in_every_language():
    for key, sentences in TABLE.items():
        assert tuple(sentences) == LANGUAGES, key


def test_rope_rows_return_to_their_places():
    rows = np.arange(2 * 6, dtype=np.float32).reshape(12, 1)  # 2 heads of 6 rows
    # What llama.cpp's converter does: row i and row i + half become neighbours.
    permuted = rows.reshape(2, 2, 3, 1).swapaxes(1, 2).reshape(12, 1)
    assert permuted[:4, 0].tolist() == [0, 3, 1, 4]
    assert (unpermute_rope_rows(permuted, heads=2) == rows).all()


def test_ctrl_c_ends_the_training_after_the_current_step():
    model = torch.nn.Linear(1, 1)
    batch = {"inputs": torch.ones(1, 1), "attention_mask": torch.ones(1, 1)}
    reports = []

    def report(loss, tokens):
        reports.append(loss)
        if len(reports) == 2:
            signal.raise_signal(signal.SIGINT)

    batches = itertools.repeat(batch)
    taken = train(model, batches, lambda batch: model(batch["inputs"]).sum(), steps=5, learning_rate=0.1, report=report)
    assert taken == len(reports) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(scope="module")
def smollm2_folder():
    try:
        return smollm2()
    except MissingPackage as missing:
        pytest.skip(str(missing))


def test_the_converted_model_speaks_english(smollm2_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])


def test_the_converted_tokenizer_gives_text_back_unchanged(smollm2_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    text = "It's 3.14,\n\n\tx = foo(); 房间很干净。"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>user 2024")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_reviews_are_balanced_and_shared_by_no_two_parts():
    try:
        train, held_out = load_reviews(seed=0)
    except MissingPackage as missing:
        pytest.skip(str(missing))
    assert load_reviews(seed=0) == (train, held_out)
    for part in (train, held_out):
        assert sum(review.positive for review in part) * 2 == len(part)
    texts = [review.text for part in (train, held_out) for review in part]
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_a_quick_demo_writes_an_adapter_that_reloads_and_merges(smollm2_folder, tmp_path):
    command = [sys.executable, "-m", "peft_run", "demo", "--quick", "--json", "--output", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result == json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (tmp_path / "adapter_model.safetensors").exists()
    difference = result["largest_logit_difference"]
    assert max(difference["reloaded"], difference["merged"]) <= difference["tolerance"] < difference["adapter_effect"]
    assert len(result["replies"]) == 3
