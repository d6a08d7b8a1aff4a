"""Prompt tuning, P-tuning, multitask prompts, CPT and Cartridge: against upstream's numbers, and by themselves."""

from __future__ import annotations

import make_prompts
import models
import pytest
import torch
from helpers import FIXTURES, tiny_tokenizer
from make_prefix import LEFT, TOKENS, batch, generated
from make_prompts import CASES, TASK_IDS, create, further, numbers
from safetensors import safe_open
from safetensors.torch import load_file

import peft
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.errors import AdapterError, AdapterMismatchError, ConfigError

FOLDER = FIXTURES / "prompts"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*None of the inputs have requires_grad")
each = pytest.mark.parametrize("name", CASES)


def loaded(name, **options):
    return PeftModel.from_pretrained(models.build(CASES[name][1]), FOLDER / name, **options)


def expected(name):
    return load_file(FOLDER / name / "expected.safetensors")


def close(found, wanted):
    for key, value in wanted.items():
        if value.isnan().all():  # upstream finds no label in cpt_gpt2
            assert not found[key].isnan().any()
            continue
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)


def logits(model, name):
    with torch.no_grad():
        return model(**batch(CASES[name][2], LEFT), **further(name)).logits


# -- the same as upstream ----------------------------------------------------------------------------------------
@each
def test_outputs_and_generation_equal_upstream(name):
    model = create(peft, name)
    wanted = expected(name)
    if name == "cpt_gpt2":  # types that no longer are labels in upstream, see CPTEmbedding.run
        del wanted["typed.loss"]
    close(numbers(model, name), wanted)
    with safe_open(FOLDER / name / "expected.safetensors", "pt") as file:
        trained = file.metadata()["trainable"].split("\n")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


@each
def test_upstreams_file_computes_the_same_here(name):
    close(numbers(loaded(name), name), {k: v for k, v in expected(name).items() if not k.endswith("loss")})


@each
def test_file_equals_upstreams(name, tmp_path):
    model = create(peft, name)
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, FOLDER / name))
    assert ours.keys() == theirs.keys()
    close(ours, theirs)
    written, upstreams = (peft.PeftConfig.from_pretrained(f).to_dict() for f in (tmp_path, FOLDER / name))
    for config in (written, upstreams):
        del config["peft_version"]
        config["modules_to_save"] = sorted(set(config["modules_to_save"] or ()))  # upstream names heads twice
    assert written == upstreams
    again = PeftModel.from_pretrained(models.build(CASES[name][1]), tmp_path)
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=0, atol=1e-6)


@each
def test_generation_without_a_cache_is_the_same(name):
    if not CASES[name][2].endswith("_LM"):
        pytest.skip("generates nothing")
    found = generated(loaded(name), LEFT, use_cache=False, **further(name))
    assert torch.equal(found, expected(name)["left.greedy"])


# -- training ----------------------------------------------------------------------------------------------------
@each
def test_exactly_the_prompt_is_trained(name):
    model = create(peft, name).train()
    model(**batch(CASES[name][2], LEFT), **further(name)).loss.backward()
    for key, p in model.named_parameters():
        frozen = ".frozen_embedding" in key or (name.startswith("cpt") and ".default.embedding." in key)
        trained = (key.startswith("prompt_encoder.") and not frozen) or ".modules_to_save." in key
        assert p.requires_grad is trained and (p.grad is not None) is trained, key
        assert not trained or p.grad.any(), key


@each
def test_a_loaded_prompt_can_be_trained_on(name):
    model = loaded(name, is_trainable=True)
    torch.testing.assert_close(logits(model.eval(), name), logits(loaded(name), name))
    model.train()(**batch(CASES[name][2], LEFT), **further(name)).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "prompt_encoder" in n)


@each
def test_disabled_is_the_base(name):
    model = create(peft, name)
    task, base = CASES[name][2], models.build(CASES[name][1])
    given = {k: v for k, v in batch(task, LEFT).items() if k != "labels" or task == "SEQ_2_SEQ_LM"}
    with torch.no_grad(), model.disable_adapter():
        found = model(**given).logits
        if not any("modules_to_save" in n for n, _ in model.named_parameters()):
            assert torch.equal(found, base(**given).logits)


@pytest.mark.parametrize("name", ["prompt_llama", "ptuning_lstm", "multitask_llama", "cpt", "cartridge", "prompt_t5"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(name, before, reentrant):
    def gradients(checkpointing):
        cls, base, task, options = CASES[name]
        torch.manual_seed(0)
        model = models.build(base)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        how = {"use_reentrant": reentrant}
        if checkpointing and before:
            model.gradient_checkpointing_enable(how)
        size = {} if cls == "CPTConfig" else {"num_virtual_tokens": TOKENS}
        model = get_peft_model(model, getattr(peft, cls)(task_type=task, **size, **options))
        make_prompts.fill(model)
        if checkpointing and not before:
            model.gradient_checkpointing_enable(how)
        model.train()(**batch(task, LEFT), **further(name)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


# -- several -----------------------------------------------------------------------------------------------------
def test_two_prompts_switch():
    model = create(peft, "prompt_llama")
    first = logits(model, "prompt_llama")
    model.add_adapter("b", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert torch.equal(logits(model, "prompt_llama"), first)
    model.set_adapter("b")
    second = logits(model, "prompt_llama")
    assert second.shape[1] == first.shape[1] + 2
    model.set_adapter("default")
    assert torch.equal(logits(model, "prompt_llama"), first)
    model.delete_adapter("b")
    assert torch.equal(logits(model, "prompt_llama"), first)


# -- prompt tuning -------------------------------------------------------------------------------------------------
def test_text_start_repeats_or_cuts_the_text(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    base = models.llama(vocab_size=300)
    ids = tiny_tokenizer()("abc")["input_ids"]
    for count in (2, 3, 7):
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=count,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="abc",
            tokenizer_name_or_path=str(tmp_path),
        )
        model = get_peft_model(models.llama(vocab_size=300), config)
        wanted = base.get_input_embeddings().weight[(ids * 3)[:count]]
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, wanted)


def test_vocabulary_start_is_rows_of_the_embedding():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    model = get_peft_model(models.llama(), config)
    rows = models.llama().get_input_embeddings().weight
    for token in model.prompt_encoder["default"].embedding.weight:
        assert (rows == token).all(1).any()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "tokenizer_name_or_path"),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS"}, "prompt_tuning_init"),
    ],
)
def test_wrong_configs_name_the_field(options, field):
    with pytest.raises(ConfigError, match=field):
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)


# -- multitask -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_starts_from_a_source(start, form, tmp_path):
    source = create(peft, "multitask_llama")
    source.save_pretrained(tmp_path, safe_serialization=form == "safetensors")
    held = source.prompt_encoder["default"]
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        num_ranks=2,
        prompt_tuning_init=start,
        prompt_tuning_init_task=1,
        prompt_tuning_init_state_dict_path=str(tmp_path / f"adapter_model.{form}"),
    )
    encoder = get_peft_model(models.llama(), config).prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, held.embedding.weight)
    for name in encoder.extra_tables:
        values = getattr(held, name)
        wanted = {"AVERAGE_SOURCE_TASKS": values.mean(0), "EXACT_SOURCE_TASK": values[1]}.get(start)
        assert (
            torch.equal(getattr(encoder, name)[0], wanted) if wanted is not None else getattr(encoder, name).std() < 0.1
        )
    config.prompt_tuning_init_state_dict_path = None
    with pytest.raises(ConfigError, match="prompt_tuning_init_state_dict_path"):
        get_peft_model(models.llama(), config)


def test_multitask_needs_tasks_and_generates_with_beams():
    model = create(peft, "multitask_llama")
    with pytest.raises(AdapterError, match="task_ids"):
        model(input_ids=LEFT)
    one = [generated(model, LEFT, num_beams=4, task_ids=TASK_IDS.flip(0))[1]]
    many = generated(model, LEFT, num_beams=4, task_ids=torch.stack([TASK_IDS[1], TASK_IDS[0]]))
    assert torch.equal(one[0], many[1])


# -- CPT -----------------------------------------------------------------------------------------------------------
def test_cpt_keeps_tokens_within_reach():
    model = create(peft, "cpt").train()
    encoder = model.prompt_encoder["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0)
    for _ in range(3):
        model.zero_grad()
        model(**batch("CAUSAL_LM", LEFT)).loss.backward()
        optimizer.step()
    moved = (encoder.table() - encoder.embedding.weight).norm(dim=1)
    assert (moved <= encoder.reach * 1.001 + 1e-6).all() and (moved[:3] > 0).all() and (moved[3:] < 1e-6).all()


@pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM", "cpt_mask": [1, 1]}])
def test_cpt_refuses_wrong_configs(options):
    with pytest.raises(ValueError, match=r"task_type|cpt_mask"):
        peft.CPTConfig(cpt_token_ids=[1, 2, 3], **options)


# -- Cartridge -----------------------------------------------------------------------------------------------------
def test_a_cartridge_from_text_continues_like_the_text():
    """Its keys and values are those of the text, so the model goes on as if it had read it."""
    tokenizer, base = tiny_tokenizer(), models.llama(vocab_size=300, max_position_embeddings=128)
    text = "hello there"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=ids.shape[1])
    model = get_peft_model(models.llama(vocab_size=300, max_position_embeddings=128), config).eval()
    table = peft.initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=False)
    assert torch.equal(table, model.get_prompt_embedding_to_save("default"))
    more = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        wanted = base(torch.cat([ids, more], 1)).logits[:, ids.shape[1] :]
        torch.testing.assert_close(model(input_ids=more).logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="too few"):
        peft.initialize_kv_prefix_from_text(model, tokenizer, text="a", use_chat_template=False)


def test_composed_cartridges_are_one_after_the_other(tmp_path):
    folders = [FOLDER / "cartridge", FOLDER / "cartridge_thawed"]
    peft.compose_cartridge_adapters(folders, output_path=tmp_path)
    model = PeftModel.from_pretrained(models.llama(), tmp_path)
    parts = [load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in folders]
    assert torch.equal(model.get_prompt_embedding_to_save("default"), torch.cat(parts))
    assert model.peft_config["default"].num_frozen_tokens == 1
    with pytest.raises(ValueError, match="At least two"):
        peft.compose_cartridge_adapters(folders[:1], output_path=tmp_path / "x")
    with pytest.raises(AdapterMismatchError, match="another model"):
        peft.compose_cartridge_adapters([folders[0], FOLDER / "cartridge_gpt2"], output_path=tmp_path / "x")
    assert not (tmp_path / "x").exists()
