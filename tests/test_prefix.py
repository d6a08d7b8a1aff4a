"""Prefix tuning, and the mechanism that puts any prompt in front of a batch, against numbers from upstream."""

from __future__ import annotations

import threading

import make_prefix
import models
import pytest
import torch
from helpers import FIXTURES, offline, python, upstream_python
from make_prefix import CASES, LEFT, PROJECTED, SIDES, TOKENS, batch, fill, generated
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict, registry
from peft.config import PromptLearningConfig
from peft.enums import PeftType
from peft.errors import AdapterError, AdapterMismatchError, ConfigError
from peft.prompts import insert
from peft.prompts.encoder import PromptEncoder

GENERATING = [name for name, (_, task, _) in CASES.items() if task.endswith("_LM")]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*None of the inputs have requires_grad")


def build(name="llama", train=False, **changes):
    """The case's base with a filled prefix."""
    base, task, options = CASES[name]
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **{**options, **changes})
    model = get_peft_model(models.build(base), config).train(train)
    fill(model)
    return model


def loaded(name):
    return PeftModel.from_pretrained(models.build(CASES[name][0]), FIXTURES / "prefix" / name)


def expected(name):
    return load_file(FIXTURES / "prefix" / name / "expected.safetensors")


@torch.no_grad()
def logits(model, ids=LEFT):
    return model(**{k: v for k, v in batch("CAUSAL_LM", ids).items() if k != "labels"}).logits


# -- the same as upstream ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("origin", [build, loaded])
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_upstream(name, origin):
    model, want = origin(name).eval(), expected(name)
    for side, ids in SIDES.items():
        with torch.no_grad():
            out = model(**batch(CASES[name][1], ids))
        tolerance = {"rtol": 0, "atol": 2e-2 if name == "llama_bf16" else 5e-6}
        torch.testing.assert_close(out.logits.float(), want[f"{side}.logits"], **tolerance)
        torch.testing.assert_close(out.loss.float(), want[f"{side}.loss"], **tolerance)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_equals_upstream_with_and_without_cache(name):
    model, want = loaded(name), expected(name)
    for side, ids in SIDES.items():
        for cache in {} if name == "llama_bf16" else {"use_cache": True}, {"use_cache": False}:
            assert torch.equal(generated(model, ids, **cache), want[f"{side}.greedy"])
            assert torch.equal(generated(model, ids, num_beams=3, **cache), want[f"{side}.beams"])


@pytest.mark.parametrize("name", CASES)
def test_file_equals_upstreams(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = load_file(FIXTURES / "prefix" / name / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    torch.testing.assert_close(ours["prompt_embeddings"], theirs["prompt_embeddings"], rtol=0, atol=1e-6)
    upstreams = PrefixTuningConfig.from_pretrained(FIXTURES / "prefix" / name)
    written = PrefixTuningConfig.from_pretrained(tmp_path)
    for field in (
        "num_layers",
        "token_dim",
        "num_attention_heads",
        "num_transformer_submodules",
        "encoder_hidden_size",
    ):
        assert getattr(written, field) == getattr(upstreams, field), field
    again = PeftModel.from_pretrained(models.build(CASES[name][0]), tmp_path)
    assert torch.equal(
        get_peft_model_state_dict(again)["prompt_embeddings"], get_peft_model_state_dict(model)["prompt_embeddings"]
    )


@pytest.mark.skipif(upstream_python() is None, reason="no environment with upstream peft")
@pytest.mark.parametrize("name", ["llama_projected", "t5"])
def test_upstream_reads_our_file(name, tmp_path):
    tell = "import importlib.metadata as m; print(m.version('transformers'))"
    if Version(python("-c", tell, interpreter=upstream_python()).strip()) >= Version("5.24"):
        pytest.skip("upstream's prompts do not work there: transformers 5.24 renamed past_key_values")
    model = build(name).eval()
    model.save_pretrained(tmp_path / "adapter")
    script = [make_prefix.__file__, "read", str(tmp_path / "adapter"), name, str(tmp_path / "out")]
    python(*script, interpreter=upstream_python(), env=offline(PYTHONPATH=""))
    with torch.no_grad():
        ours = model(**batch(CASES[name][1], LEFT)).logits
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], ours, rtol=0, atol=5e-6)


# -- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "llama_projected", "t5", "classifier"])
def test_the_prompt_is_trained_and_the_base_is_not(name):
    model = build(name, train=True)
    model(**batch(CASES[name][1], LEFT)).loss.backward()
    for key, p in model.named_parameters():
        trained = key.startswith("prompt_encoder.") or ".modules_to_save." in key
        assert p.requires_grad is trained and (p.grad is not None) is trained, key
        assert not trained or p.grad.any(), key


def test_gradient_is_the_slope():
    model = build("llama_projected", train=True).double()  # its norms and softmax stay float32
    weight = model.prompt_encoder["default"].embedding.weight
    model(input_ids=LEFT).logits.square().sum().backward()
    direction, step = models.noise(weight.shape, 9).double(), 1e-2
    ends = []
    with torch.no_grad():
        start = weight.clone()
        for sign in (1, -1):
            weight.copy_(start + sign * step * direction)
            ends.append(model(input_ids=LEFT).logits.square().sum())
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((weight.grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_projected", "gpt2", "t5", "bert"])
def test_checkpointing_changes_no_gradient(name, before, reentrant):
    base, task, options = CASES[name]

    def gradients(checkpointing):
        model = models.build(base)
        for module in model.modules():  # recomputing draws the same dropout, but two runs do not
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        if checkpointing and before:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **options))
        if checkpointing and not before:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fill(model)
        out = model.train()(**batch(task, LEFT))
        out.loss.backward()
        return out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    want, got = gradients(False), gradients(True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_prefix_that_is_dropped_is_an_error():
    from transformers import LlamaForCausalLM

    class Deaf(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None):
            return super().forward(input_ids)

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(AdapterError, match="did not read the prefix"):
        get_peft_model(Deaf(models.llama_config()), config)(input_ids=LEFT)


# -- several prompts ---------------------------------------------------------------------------------------------
def two_prompts():
    model = build("classifier")
    model.add_adapter("b", PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5, **PROJECTED))
    return model


def trained(model):
    return {n.split(".")[1 if n.startswith("prompt") else 3] for n, p in model.named_parameters() if p.requires_grad}


def test_switching_and_deleting():
    model = two_prompts()
    first = logits(model)
    assert trained(model) == {"default"} and model.active_adapter == "default"
    model.set_adapter("b")
    second = logits(model)
    assert trained(model) == {"b"} and not torch.equal(first, second)
    assert {n: len(t) for n, t in model.prompt_tokens.items()} == {"default": 3, "b": 5}
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("b")
    assert torch.equal(logits(model), first) and trained(model) == {"default"}
    model.delete_adapter("default")
    assert type(model.base_model.score) is nn.Linear and not model.peft_config
    assert torch.equal(logits(model), logits(models.llama_classifier()))


def test_adapter_names_choose_for_one_call_and_thread():
    model = two_prompts()
    want = {"__base__": logits(models.llama_classifier()), "default": logits(model)}
    model.set_adapter("b")
    want["b"] = logits(model)
    wrong = []

    def work(name):
        for _ in range(20):
            with torch.no_grad():
                got = model(input_ids=LEFT, attention_mask=(LEFT != 0).long(), adapter_names=[name] * 2).logits
            wrong.extend([] if torch.equal(got, want[name]) else [name])

    threads = [threading.Thread(target=work, args=(name,)) for name in want for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    for names, message in ((["x", "b"], "non-existing"), (["default", "b"], "one adapter for all samples")):
        with pytest.raises(AdapterError, match=message):
            model(input_ids=LEFT, adapter_names=names)


@pytest.mark.parametrize("name", ["llama", "t5", "classifier"])
def test_disabled_is_the_base_bit_for_bit(name):
    base, model, task = models.build(CASES[name][0]), build(name), CASES[name][1]
    with torch.no_grad():
        active = model(**batch(task, LEFT)).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch(task, LEFT)).logits, base(**batch(task, LEFT)).logits)
            if name in GENERATING:
                assert torch.equal(generated(model, LEFT), generated(base, LEFT))
        assert torch.equal(model(**batch(task, LEFT)).logits, active)
    assert not model.base_model._forward_pre_hooks


# -- files -------------------------------------------------------------------------------------------------------
def test_several_prompts_round_trip_and_stay_frozen(tmp_path):
    model = two_prompts()
    want = [logits(model), model.set_adapter("b") or logits(model)]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(models.llama_classifier(), tmp_path)
    again.load_adapter(tmp_path / "b", "b")
    got = [logits(again), again.set_adapter("b") or logits(again)]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", ["llama", "llama_projected"])
def test_a_loaded_prefix_can_be_trained_on(name):
    """Of a projected one the file holds the result, which is trained itself then."""
    model = PeftModel.from_pretrained(models.build(CASES[name][0]), FIXTURES / "prefix" / name, is_trainable=True)
    assert torch.equal(logits(model.eval()), logits(loaded(name)))
    model.train()(**batch(CASES[name][1], LEFT)).loss.backward()
    held = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if p.requires_grad}
    assert held == {"prompt_encoder.default.embedding.weight": True}


def test_a_wrong_file_leaves_no_trace(tmp_path):
    build("classifier").save_pretrained(tmp_path)
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=TOKENS + 1)
    base = models.llama_classifier()
    before = [n for n, _ in base.named_parameters()]
    with pytest.raises(AdapterMismatchError, match="size mismatch for prompt_embeddings"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert [n for n, _ in base.named_parameters()] == before
    model = build("llama_projected")  # a file put into a prefix that is being trained replaces it
    model.load_adapter(FIXTURES / "prefix" / "llama_projected", "default")
    assert torch.equal(logits(model.eval()), logits(loaded("llama_projected")))


# -- configs and errors ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, PROJECTED])
def test_zero_start(options):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, init_weights="zero", **options)
    assert not get_peft_model(models.llama(), config).prompt_encoder["default"].table().any()
    with pytest.raises(ConfigError, match="init_weights"):
        PrefixTuningConfig(init_weights="one")


def test_errors_say_what_to_do():
    for options in ({}, {"num_virtual_tokens": 0}):
        with pytest.raises(ConfigError, match="num_virtual_tokens must be at least 1"):
            get_peft_model(models.llama(), PrefixTuningConfig(task_type="CAUSAL_LM", **options))
    with pytest.raises(ConfigError, match="need a transformers model"):
        get_peft_model(models.build("mlp"), PrefixTuningConfig(num_virtual_tokens=2))
    model = build()
    with pytest.raises(AdapterError, match="static cache"):
        generated(model, LEFT, cache_implementation="static")
    with pytest.raises(AdapterError, match="cannot continue a cache"):
        generated(model, LEFT, past_key_values=model.get_prompt(2))
    assert not model.base_model._forward_pre_hooks


def test_a_model_without_a_cache_is_refused():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(DistilBertForSequenceClassification(sizes), config)
    with pytest.raises(ValueError, match="does not support past key values"):
        model(input_ids=LEFT)


def test_a_returned_cache_can_be_continued():
    model = build()
    ids = torch.tensor([[1, 17, 3, 3, 40]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        start = model(input_ids=ids[:, :4], use_cache=True)
        cache = next(start[n] for n in insert.CACHE_NAMES if n in start)
        rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-6)


# -- prompts in front of the embeddings --------------------------------------------------------------------------
class Config(PromptLearningConfig):
    METHOD = PeftType.PROMPT_TUNING


class Encoder(PromptEncoder):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim)

    def forward(self, batch_size, task_ids=None):
        return self.embedding.weight.expand(batch_size, -1, -1)


@pytest.fixture
def embedded(monkeypatch):
    """Makes a model with a prompt in front of its embeddings."""
    monkeypatch.setitem(
        registry._METHODS, "PROMPT_TUNING", registry.Method("PROMPT_TUNING", Config, None, "", encoder=Encoder)
    )

    def make(base, task):
        model = get_peft_model(models.build(base), Config(task_type=task, num_virtual_tokens=TOKENS)).eval()
        fill(model)
        return model

    return make


@pytest.mark.parametrize("base", make_prefix.EMBEDDED)
def test_embedded_prompts_equal_upstream(embedded, base):
    task = make_prefix.EMBEDDED[base]
    model, want = embedded(base, task), load_file(FIXTURES / "prefix" / f"embedded_{base}.safetensors")
    got = make_prefix.numbers(model, task, task.endswith("_LM"))
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
    for side, ids in SIDES.items() if task == "CAUSAL_LM" else ():
        assert torch.equal(generated(model, ids, use_cache=False), want[f"{side}.greedy"])


def test_embedded_prompts_count_no_loss_on_virtual_tokens(embedded):
    model = embedded("bert_tokens", "TOKEN_CLS")
    out = model(**batch("TOKEN_CLS", LEFT), token_type_ids=torch.ones_like(LEFT))
    want = nn.functional.cross_entropy(out.logits[:, TOKENS:].flatten(0, 1), (LEFT % 3).flatten())
    torch.testing.assert_close(out.loss, want)
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        model(**batch("TOKEN_CLS", LEFT), position_ids=torch.arange(5)[None])
