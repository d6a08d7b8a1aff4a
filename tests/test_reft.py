"""ReFT: the laws of a method, on whole models, whose hidden states it changes at some tokens."""

from __future__ import annotations

import copy
import pickle
import warnings

import models
import pytest
import torch
from laws_table import base_tensors, gap, quiet, same_tensors, train_a_little, under_checkpointing
from reft_models import (
    BASES,
    IDS,
    LEFT,
    PLACES,
    RIGHT,
    build,
    by_formula,
    columns_of,
    config,
    labelled,
    logits,
    with_second,
    wrapped,
    written,
)

import peft

ANY = pytest.mark.parametrize("base", BASES)
ALL = columns_of(torch.ones(4, 10, dtype=torch.bool))
FIVE = columns_of(torch.ones(4, 5, dtype=torch.bool))


@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
def test_computes_what_the_paper_says(places, mask, variant):
    options = {**PLACES[places], "variant": variant}
    model = wrapped(**options).double()
    fresh = by_formula(model, "llama", options, ALL if mask is None else columns_of(mask))
    tokens = slice(None) if mask is None else mask
    wanted = logits(fresh, mask=mask)[tokens]
    assert gap(logits(model, mask=mask)[tokens], wanted) < 1e-9
    assert gap(logits(build("llama").double(), mask=mask)[tokens], wanted) > 1e-2


@pytest.mark.parametrize("per", ["side", "position"])
@pytest.mark.parametrize("places", ["ends", "first", "listed"])
def test_interventions_of_their_own(places, per):
    options = {**PLACES[places], "intervention_per": per}
    model = wrapped(**options).double()
    count = {"side": {"ends": 2, "first": 1, "listed": 2}, "position": {"ends": 5, "first": 4, "listed": 4}}[per][
        places
    ]
    assert all(p.shape[0] == count for n, p in model.named_parameters() if "reft_" in n)
    fresh = by_formula(model, "llama", options, columns_of(LEFT))
    assert gap(logits(model, mask=LEFT)[LEFT], logits(fresh, mask=LEFT)[LEFT]) < 1e-9


@pytest.mark.parametrize("base", ["gpt2", "bert_classifier", "llama_classifier", "t5"])
@pytest.mark.parametrize("mask", [None, RIGHT], ids=["none", "right"])
def test_computes_what_the_paper_says_on_any_model(base, mask):
    options = {"prefix_positions": 2, "suffix_positions": 1}
    model = wrapped(base).double()
    rows = ALL if mask is None else columns_of(mask)
    fresh = by_formula(model, base, options, rows, FIVE if base == "t5" else None)
    tokens = slice(None) if mask is None or base != "gpt2" else mask
    assert gap(logits(model, base, mask=mask)[tokens], logits(fresh, base, mask=mask)[tokens]) < 1e-9


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("places", PLACES)
def test_padding_changes_nothing(places, mask):
    model = wrapped(**PLACES[places])
    positions = (mask.long().cumsum(1) - 1).clamp(0)
    together = logits(model, mask=mask, position_ids=positions)
    for i, row in enumerate(mask):
        assert gap(together[i][row], logits(model, ids=IDS[i : i + 1, row])[0]) < 1e-5


# -- start, files, copies --------------------------------------------------------------------------------------------
@ANY
@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft"])
def test_starts_as_the_base_bit_for_bit(base, variant):
    model = wrapped(base, trained=False, variant=variant)
    assert torch.equal(logits(model, base), logits(build(base), base))
    train_a_little(model)
    assert gap(logits(model, base), logits(build(base), base)) > 1e-2
    at_random = wrapped(base, trained=False, variant=variant, init_weights=False)
    assert gap(logits(at_random, base), logits(build(base), base)) > 1e-2


@ANY
def test_disabled_and_unloaded_are_the_base(base):
    model, fresh = with_second(base), build(base)
    tensors = base_tensors(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, base), logits(fresh, base))
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    assert same_tensors(base_tensors(model), tensors)
    plain = model.unload()
    assert torch.equal(logits(plain, base), logits(fresh, base))
    assert same_tensors(dict(plain.state_dict()), dict(fresh.state_dict()))


@ANY
@quiet
def test_files_hold_all_of_it(base, tmp_path):
    model = with_second(base)
    first = logits(model, base)
    model.set_adapter("second")
    second = logits(model, base)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(base), tmp_path)
    assert torch.equal(logits(loaded, base), first)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, base), second)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@quiet
def test_copies_are_exact(how):
    model = with_second()
    twin = how(model)
    assert torch.equal(logits(twin, mask=LEFT), logits(model, mask=LEFT))
    assert torch.equal(written(twin), written(model))
    train_a_little(twin, seed=9)
    assert not torch.equal(logits(twin), logits(model))


# -- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("per", ["layer", "position"])
@quiet
def test_rows_of_R_stay_orthonormal(dtype, per, tmp_path):
    """However far the tensor behind it goes, in training, in half precision and in files."""
    model = wrapped(build("llama").to(dtype), intervention_per=per).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, weight_decay=0.3)

    def worst(model):
        found = [layer.adapters["default"] for layer in model.base_model.layers.values()]
        R = torch.cat([a.subspace() for a in found])
        raw = torch.cat([a.reft_R for a in found])
        assert R.dtype is torch.float32
        return [float((m @ m.mT - torch.eye(3)).abs().max()) for m in (R, raw)]

    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
    assert worst(model)[0] < 2e-6 < 0.1 < worst(model)[1]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama").to(dtype), tmp_path)
    assert worst(loaded)[0] < 2e-6 and torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@quiet
def test_checkpointing_gives_the_same_gradients(base, reentrant):
    mask = RIGHT if base == "t5" else LEFT
    batch = {"input_ids": IDS, "attention_mask": mask.long(), "labels": labelled(mask)[0]}
    grads = under_checkpointing(lambda: wrapped(base), reentrant, **batch)
    assert len(grads[0]) == len(grads[1]) >= 6
    assert all(g is not None and g.abs().sum() > 0 for g in grads[0])
    assert all(gap(a, b) < 1e-5 for a, b in zip(*grads))


def test_autocast_and_half_precision_stay_near_float32():
    model = wrapped()
    wanted = logits(model, mask=LEFT)[LEFT]
    with torch.autocast("cpu", torch.bfloat16):
        assert gap(logits(model, mask=LEFT)[LEFT], wanted) < 0.05
    half = wrapped("llama_bf16")
    peft.set_peft_model_state_dict(half, peft.get_peft_model_state_dict(model))
    assert gap(logits(half, mask=LEFT)[LEFT], wanted) < 0.08


# -- which blocks ----------------------------------------------------------------------------------------------------
TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LM, CLS = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
FAMILIES = {
    "opt": (LM, {**TINY, "word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 64}),
    "bloom": (LM, TINY),
    "gpt_neox": (LM, TINY),
    "falcon": (LM, TINY),
    "phi": (LM, TINY),
    "qwen2": (LM, {**TINY, "num_key_value_heads": 2}),
    "qwen3": (LM, {**TINY, "num_key_value_heads": 2, "head_dim": 4}),
    "gemma2": (LM, {**TINY, "num_key_value_heads": 2, "head_dim": 4}),
    "mpt": (LM, {"vocab_size": 64, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "gptj": (LM, {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "mamba": (LM, {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "roberta": (CLS, {**TINY, "max_position_embeddings": 66}),
    "distilbert": (CLS, {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}),
    "deberta-v2": (CLS, {**TINY, "max_position_embeddings": 64}),
    "modernbert": (CLS, {**TINY, "pad_token_id": 0, "global_attn_every_n_layers": 1}),
    "bart": (
        "AutoModelForSeq2SeqLM",
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24}
        | {"decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
}


def family(name):
    """A tiny model of that type."""
    import transformers

    auto, settings = FAMILIES[name]
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return models.fill(
        getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(name, **{**ends, **settings}))
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
@quiet
def test_finds_the_blocks_of(name):
    fresh = family(name)
    model = wrapped(copy.deepcopy(fresh), trained=False)
    count = 4 if name == "bart" else 2
    assert len(model.base_model.layers) == len(model.peft_config["default"].target_modules) == count
    assert all(layer.width == 16 for layer in model.base_model.layers.values())
    batch = {"input_ids": IDS, "attention_mask": RIGHT.long()}
    before = fresh(**batch).logits
    assert gap(model(**batch).logits, before) < 1e-6  # the memory's layout shows in some kernels
    train_a_little(model)
    assert gap(model(**batch).logits, before) > 1e-3
    if FAMILIES[name][0] != CLS:
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": LEFT.long()}
        if name == "mamba":
            how["attention_mask"] = torch.ones_like(IDS)
        assert torch.equal(model.generate(IDS, **how), model.generate(IDS, use_cache=False, **how))


@quiet
def test_leaves_the_blocks_of_images_alone():
    """And those are still there to be named; the masks of tokens do not fit them."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = {**models.llama_config().to_dict(), "model_type": "llama"}
    fresh = models.fill(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=60))
    )
    batch = {"input_ids": torch.tensor([[1, 60, 60, 60, 60, 5, 6]]), "pixel_values": models.noise((1, 3, 8, 8), 1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = wrapped(copy.deepcopy(fresh))
    assert model.peft_config["default"].target_modules == {f"model.language_model.layers.{i}" for i in range(2)}
    how = {**batch, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**how), model.generate(**how, use_cache=False))
    model = wrapped(fresh, target_modules=r".*vision_tower.*layers\.\d")
    assert all(layer.width == 8 for layer in model.base_model.layers.values())
    with pytest.raises(ValueError, match="cannot tell which are tokens"):
        model(**batch)


def test_chooses_layers():
    assert wrapped(layers_to_transform=1).peft_config["default"].target_modules == {"model.layers.1"}
    assert wrapped("t5", layers_to_transform=[0]).peft_config["default"].target_modules == {
        "encoder.block.0",
        "decoder.block.0",
    }
    assert wrapped("t5", target_modules=r"encoder\.block\.\d+").base_model.layers.keys() == {
        "encoder.block.0",
        "encoder.block.1",
    }
    deep = wrapped(models.llama(num_hidden_layers=24), layers_to_transform=list(range(1, 23)))
    assert len(deep.base_model.layers) == 22
    again = peft.get_peft_model(models.llama(num_hidden_layers=24), copy.deepcopy(deep.peft_config["default"]))
    assert again.base_model.layers.keys() == deep.base_model.layers.keys()


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"r": 0}, "r must be"),
        ({"variant": "nodireft"}, "variant"),
        ({"prefix_positions": -1}, "prefix_positions"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "at least one position"),
        ({"positions": [1, 1]}, "none twice"),
        ({"positions": []}, "at least one position"),
        ({"positions": [0], "prefix_positions": 2}, "must be left out"),
        ({"positions": "every"}, "positions"),
        ({"positions": "all", "intervention_per": "side"}, "intervention_per"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_configs_that_cannot_be(changes, field):
    with pytest.raises(ValueError, match=field):
        peft.ReftConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 17}, "r must be at most 16"),
        ({"layers_to_transform": [1, 2]}, r"layers \[2\]; the model has 0 to 1"),
        ({"target_modules": ["no_such"]}, "not found"),
    ],
)
def test_models_that_cannot_be(changes, told):
    base = build("llama")
    with pytest.raises(ValueError, match=told):
        peft.get_peft_model(base, config(**changes))
    assert torch.equal(logits(base), logits(build("llama"))) and not hasattr(base, "peft_config")


def test_models_without_known_blocks():
    with pytest.raises(ValueError, match="name its blocks"):
        peft.get_peft_model(models.fill(models.Mlp()), config())
    base = torch.nn.Sequential(models.fill(models.Mlp()))
    with pytest.raises(ValueError, match="hidden_size must be set"):
        peft.get_peft_model(base, config(target_modules=["0"]))
    model = peft.get_peft_model(base, config(target_modules=["0"], hidden_size=9))
    with pytest.raises(ValueError, match=r"of width 5.*made for 9"):
        model(models.noise((3, 16), 1))


def test_calls_that_cannot_be():
    model = wrapped()
    with pytest.raises(ValueError, match="not called through its PeftModel"):
        model.get_base_model()(input_ids=IDS)
    with pytest.raises(ValueError, match="3 numbers for 4 rows"):
        model(input_ids=IDS, prompt_lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="whole numbers"):
        model(input_ids=IDS, prompt_lengths=[1.5] * 4)
    with pytest.raises(ValueError, match="Pass it as"):
        model(input_ids=IDS, attention_mask=torch.ones(4, 1, 10, 10))
    with pytest.raises(ValueError, match="use get_peft_model"):
        peft.inject_adapter_in_model(config(), build("llama"))


class Halved(torch.nn.Module):
    """Its block sees every other token."""

    def __init__(self):
        super().__init__()
        self.block = torch.nn.Linear(16, 16)

    def forward(self, x, attention_mask=None):
        return self.block(x[:, ::2])


@pytest.mark.parametrize("by_position", [False, True])
def test_masks_of_something_else(by_position):
    model, x = wrapped(Halved(), target_modules=["block"]), models.noise((4, 10, 16), 1)
    model(x)
    with pytest.raises(ValueError, match=r"shape \(4, 10\), but a block got 4 rows of 5"):
        model(x, LEFT) if by_position else model(x, attention_mask=LEFT)


def test_says_which_hidden_states_transformers_returns():
    model = wrapped()
    with pytest.warns(peft.PeftWarning, match="before ReFT changes them"):
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], build("llama")(input_ids=IDS, output_hidden_states=True).hidden_states[1])


def test_starting_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(build("llama"), config())(input_ids=IDS)
