"""Merging, exporting and talking: the copies are the same model, and what cannot be made is refused in one line."""

import json
import re
import subprocess
import sys

import pytest
import torch
from test_train import CHATS, REVIEWS, train_one
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_run import artefact
from peft_run.deploy import probe
from peft_run.deploy.export import export
from peft_run.deploy.merge import adapted_logits, merge
from peft_run.deploy.ollama import template
from peft_run.errors import RunError, UsageError
from peft_run.gguf_llama import GgufLlama

FEW = {"epochs": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    return train_one(tmp_path_factory.mktemp("chat"), tiny, CHATS, train={"epochs": 10})[0]


def test_the_merged_model_is_the_adapted_one(run, tmp_path):
    out = tmp_path / "merged"
    report = merge(run, out)
    assert report["difference"] < 1e-3 < report["effect"]
    tuned = artefact.load(run)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    rows = probe.prompts(tuned)
    assert probe.largest_difference(probe.logits(plain, rows), probe.logits(tuned.model, rows)) < 1e-4
    assert plain.generation_config.eos_token_id == tuned.stop_ids
    assert AutoTokenizer.from_pretrained(out).chat_template == tuned.tokenizer.chat_template
    with pytest.raises(UsageError, match="not an empty folder"):
        merge(run, out)
    assert run.read_json("metrics.json")["merge"]["tokens_compared"] > 0


def test_a_copy_in_half_precision_keeps_what_no_file_holds(run, tmp_path):
    """Rotary frequencies are float32 in a model that is read as bfloat16; a plain `.to` would round them."""
    assert merge(run, tmp_path / "merged", dtype="bf16")["dtype"] == "bfloat16"


@pytest.fixture(scope="module", params=[4, 8])
def quantized_run(request, tmp_path_factory, wide_tiny):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantized")
    return train_one(folder, wide_tiny, CHATS, model={"quant": {"bits": request.param}}, train={"epochs": 10})[0]


def test_the_merged_model_is_the_one_that_was_trained_on_a_quantized_base(quantized_run, tmp_path):
    """The weights before quantization would be another model."""
    report = merge(quantized_run, tmp_path / "merged")
    assert report["onto"] == "trained" and "moved" not in report
    assert report["difference"] < 1e-3 < report["effect"]
    tuned, rows, trained = adapted_logits(quantized_run, quantized=True)
    assert tuned.model.get_base_model().is_quantized
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(plain.config, "quantization_config")
    assert probe.largest_difference(probe.logits(plain, rows), trained) < 1e-4
    report = export(quantized_run, tmp_path / "vllm", "vllm")
    assert report["form"] == "merged" and report["onto"] == "trained"  # beside its base it would be on the original


def test_a_merge_into_the_original_weights_says_how_far_it_is_from_what_was_trained(quantized_run, tmp_path):
    report = merge(quantized_run, tmp_path / "merged", onto="original")
    _, rows, trained = adapted_logits(quantized_run, quantized=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    moved = probe.largest_difference(probe.logits(plain, rows), trained)
    assert report["onto"] == "original" and report["moved"] > 1e-3
    assert moved == pytest.approx(report["moved"], abs=1e-4)


def test_a_classifier_is_merged_with_its_head(tmp_path, tiny):
    run, _ = train_one(tmp_path, tiny, REVIEWS, task="seq_cls", train=FEW)
    report = merge(run, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert set(plain.config.id2label.values()) == {"good", "bad"} and report["difference"] < 1e-3
    with pytest.raises(UsageError, match="seq_cls"):
        export(run, tmp_path / "file", "gguf")


def test_what_no_weight_does_is_not_merged(tmp_path, tiny):
    run, _ = train_one(tmp_path, tiny, CHATS, train=FEW, adapter={"method": "prompt_tuning", "r": 4})
    with pytest.raises(UsageError, match="PROMPT_TUNING cannot be merged"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_changes_the_model_is_refused(run, tmp_path, monkeypatch):
    import peft

    real = peft.PeftModel.__getattr__

    def wrong(self, name):
        if name != "merge_and_unload":
            return real(self, name)

        def merged(*args, **kwargs):
            model = real(self, name)(*args, **kwargs)
            with torch.no_grad():
                model.model.norm.weight.mul_(1.01)
            return model

        return merged

    monkeypatch.setattr(peft.PeftModel, "__getattr__", wrong)
    with pytest.raises(RunError, match="not the same model"):
        merge(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_file_gives_the_model_back(run, tmp_path, kind):
    report = export(run, tmp_path / "out", "gguf", kind=kind)
    file = GgufLlama(tmp_path / "out" / report["file"])
    tuned = artefact.load(run)
    rows = probe.prompts(tuned)
    again = file.model(torch.float32).eval()
    tuned_logits = probe.logits(tuned.model, rows)
    assert probe.largest_difference(probe.logits(again, rows), tuned_logits) < (0.05 if kind == "F16" else 1.5)
    assert report["tokens"] > 0 and (kind == "Q8_0" or report["tokens_agreed"] == report["tokens"])
    assert file.tokenizer()("Sure, 42 !")["input_ids"] == tuned.tokenizer("Sure, 42 !")["input_ids"]
    # the file says where its answers end
    assert file["tokenizer.ggml.eos_token_id"] == tuned.stop_ids[0]


def test_ollama_gets_the_same_chat(run, tmp_path):
    export(run, tmp_path / "out", "ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./test-f16.gguf") and 'PARAMETER stop "<end>"' in text
    renderer = artefact.load(run).renderer
    chats = [
        [("user", "one")],
        [("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three")],
    ]
    for chat in chats:
        messages = [{"role": role, "content": content} for role, content in chat]
        assert as_ollama_does(template(renderer), messages) == renderer.text(messages, generate=True)


def as_ollama_does(written, messages):
    """What Go's template engine makes of our templates, which all have one shape."""
    shape = re.fullmatch(
        r"{{- if \.System }}(.*){{ else }}(.*?){{ end }}{{- range .*? }}{{- \$last := .*? -}}"
        r'{{- if eq \.Role "user" }}(.*?){{ if \$last }}(.*?){{ end }}'
        r'{{- else if eq \.Role "assistant" }}(.*?){{ end }}{{- end }}',
        written,
        flags=re.DOTALL,
    )
    system, begin, user, ask, assistant = shape.groups()
    told = next((m["content"] for m in messages if m["role"] == "system"), None)
    text = begin if told is None else system.replace("{{ .System }}", told)
    turns = [m for m in messages if m["role"] != "system"]
    for turn in turns:
        part = user if turn["role"] == "user" else assistant
        text += part.replace("{{ .Content }}", turn["content"])
    return text + ask


def test_vllm_gets_the_adapter_or_the_merged_model(run, tmp_path, tiny):
    report = export(run, tmp_path / "adapter", "vllm")
    script = (tmp_path / "adapter" / "serve.sh").read_text()
    assert report["form"] == "adapter" and "--enable-lora" in script and "--max-lora-rank 16" in script
    assert (tmp_path / "adapter" / "test" / "adapter_model.safetensors").is_file()
    other, _ = train_one(tmp_path, tiny, CHATS, train=FEW, adapter={"options": {"use_dora": True}})
    assert export(other, tmp_path / "merged", "vllm")["form"] == "merged"
    assert (tmp_path / "merged" / "config.json").is_file() and (tmp_path / "merged" / "serve.sh").is_file()


def test_chat_answers_undoes_and_saves(run, tmp_path, peft):
    words = "Say a.\n/undo\nSay b.\n/base on\nSay c.\n/save kept.jsonl\n/nonsense\n"
    done = subprocess.run(
        [sys.executable, "-m", "peft_run", "chat", str(run.path), "--compare", "--max-new-tokens", "8"],
        input=words,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[base]") == 3 == done.stdout.count("[tuned]") and "done" in done.stdout
    assert "/nonsense" in done.stderr
    saved = json.loads((tmp_path / "kept.jsonl").read_text())
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == ["Say b.", "Say c."]


def test_inspect_doctor_and_import(run, tmp_path, peft):
    shown = json.loads(peft("inspect", run.path, "--json").stdout)
    assert shown["method"] == "LORA" and shown["finite"] and len(shown["modules"]) == 2 * 7
    assert json.loads(peft("doctor", "--json").stdout)["extras"]["run"] == "ready"
    file = export(run, tmp_path / "out", "gguf")["file"]
    done = peft("import-model", tmp_path / "out" / file, "-o", tmp_path / "model", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() > 0
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    failed = peft("import-model", tmp_path / "broken.gguf", "-o", tmp_path / "no")
    assert failed.returncode == 2 and len(failed.stderr.strip().splitlines()) == 1
