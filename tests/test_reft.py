"""ReFT: the laws of a method, on whole models, whose hidden states it changes at some tokens of the prompt."""

from __future__ import annotations

import copy
import pickle
import warnings

import models
import pytest
import torch
from case import cards
from laws_table import base_tensors, gap, quiet, same_tensors, train_a_little

import peft

gram_schmidt = cards()["reft"].gram_schmidt
BASES = ["llama", "mistral", "gpt2", "moe", "t5", "bert_classifier", "llama_classifier", "llama_bf16"]
ANY = pytest.mark.parametrize("base", BASES)
IDS = torch.tensor([[1, 5, 9, 33, 12, 63, 8, 3, 22, 10], [1, 17, 3, 3, 40, 22, 10, 7, 7, 31], [4] * 10, [9, 8] * 5])
LENGTHS = [10, 6, 2, 1]  # of the rows, where they are padded
RIGHT = torch.arange(10) < torch.tensor(LENGTHS).unsqueeze(1)
LEFT = RIGHT.flip(1)
PLACES = {
    "ends": {"prefix_positions": 2, "suffix_positions": 3},
    "first": {"prefix_positions": 4, "suffix_positions": 0},
    "last": {"prefix_positions": 0, "suffix_positions": 1},
    "listed": {"positions": [1, 4, -1, -6]},
    "all": {"positions": "all"},
}


def build(base):
    """A base model; eager attention in float64 makes NaN of rows that begin with padding."""
    return models.llama(attn_implementation="sdpa") if base == "llama" else models.build(base)


def config(**changes):
    """An adapter on all blocks."""
    return peft.ReftConfig(**{"r": 3, "prefix_positions": 2, "suffix_positions": 1, **changes})


@quiet
def wrapped(base="llama", trained=True, **changes):
    """A model with an adapter, in eval mode."""
    torch.manual_seed(0)
    if "positions" in changes:
        changes = {"prefix_positions": None, "suffix_positions": None, **changes}
    model = peft.get_peft_model(build(base) if isinstance(base, str) else base, config(**changes))
    if trained:
        train_a_little(model)
    return model.eval()


@quiet
def with_second(base="llama", **changes):
    """A model with two adapters, the first of them active."""
    model = wrapped(base)
    model.add_adapter("second", config(**{"r": 2, "variant": "direft", "suffix_positions": 2, **changes}))
    train_a_little(model, "second", 5000)
    return model.eval()


def inputs(base="llama", ids=IDS, mask=None):
    """A batch."""
    batch = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask.long()}
    return {**batch, "decoder_input_ids": ids[:, :5]} if base == "t5" else batch


@torch.no_grad()
def logits(model, base="llama", ids=IDS, mask=None, **call):
    """The model's logits."""
    return model(**inputs(base, ids, mask), **call).logits


# -- the formula, written out ----------------------------------------------------------------------------------------
def chosen(options, tokens):
    """[(index in `tokens`, number of its intervention)] for a row with these columns of tokens."""
    count, per = len(tokens), options.get("intervention_per", "layer")
    if options.get("positions") == "all":
        return [(i, 0) for i in range(count)]
    wanted = options.get("positions")
    if wanted is None:
        wanted = [*range(options["prefix_positions"]), *range(-options["suffix_positions"], 0)]
    units = {"layer": [0] * len(wanted), "side": [int(w < 0) for w in wanted], "position": list(range(len(wanted)))}
    units = [u - min(units[per]) for u in units[per]]
    found = {}
    for w, unit in sorted(zip(wanted, units), key=lambda pair: pair[0] < 0):
        place = w + count if w < 0 else w
        if 0 <= place < count:
            found.setdefault(place, unit)
    return list(found.items())


def change_hidden(module, tensors, path, options, rows, columns=slice(None)):
    """A hook that changes a block's output at the tokens of `rows`, [columns of the tokens of each row]."""
    R, W, b = (tensors[f"{path}.reft_{name}"] for name in "RWb")
    variant = options.get("variant", "loreft")

    def hook(_, args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        for row, tokens in zip(hidden, rows):
            for place, unit in chosen(options, tokens):
                h, rotation = row[tokens[place]].clone(), R[unit]
                rotation = gram_schmidt(rotation) if variant == "loreft" else rotation
                inner = W[unit] @ h + b[unit] - (0 if variant == "direft" else rotation @ h)
                row[tokens[place]] = h + rotation.T @ inner
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return module.register_forward_hook(hook)


def by_formula(model, base, options, rows, in_decoder=None):
    """A float64 base model that computes what the adapter should. in_decoder: rows of an encoder-decoder's decoder."""
    tensors = {
        k.removeprefix("base_model.model."): v.double() for k, v in peft.get_peft_model_state_dict(model).items()
    }
    fresh = build(base).double()
    for path in {k.rpartition(".")[0] for k in tensors}:
        here = rows if in_decoder is None or path.startswith("encoder") else in_decoder
        change_hidden(fresh.get_submodule(path), tensors, path, options, here)
    return fresh


def columns_of(mask):
    """The columns of each row's tokens."""
    return [torch.arange(mask.shape[1])[row].tolist() for row in mask]


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


# -- what the prompt is ----------------------------------------------------------------------------------------------
ANSWERS = [7, 4, 9, 1]  # where they begin


def labelled(mask):
    """Labels whose answers begin at these tokens, and the same as the columns of the prompts' tokens."""
    rows = columns_of(mask)
    starts = [min(a, len(tokens) - 1) for a, tokens in zip(ANSWERS, rows)]
    labels = torch.full_like(IDS, -100)
    for i, (start, tokens) in enumerate(zip(starts, rows)):
        labels[i, tokens[start:]] = IDS[i, tokens[start:]]
    return labels, [tokens[:start] or tokens for start, tokens in zip(starts, rows)], [max(s, 1) for s in starts]


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("places", PLACES)
def test_labels_and_lengths_say_where_the_prompt_ends(places, mask):
    """So that training changes what generating will; a row whose first label counts is taken whole."""
    labels, prompts, lengths = labelled(mask)
    model = wrapped(**PLACES[places]).double()
    fresh = by_formula(model, "llama", PLACES[places], prompts)
    wanted = logits(fresh, mask=mask)[mask]
    assert gap(logits(model, mask=mask, labels=labels)[mask], wanted) < 1e-9
    lengths = [n if p != t else len(t) for n, p, t in zip(lengths, prompts, columns_of(mask))]
    assert gap(logits(model, mask=mask, prompt_lengths=torch.tensor(lengths))[mask], wanted) < 1e-9
    whole = by_formula(model, "llama", PLACES[places], columns_of(mask))
    assert gap(logits(model, mask=mask)[mask], logits(whole, mask=mask)[mask]) < 1e-9
    everything = torch.where(mask, IDS, -100)
    assert torch.equal(logits(model, mask=mask, labels=everything), logits(model, mask=mask))


def test_labels_of_an_encoder_decoder():
    """The decoder's prompt is what stands before its first label, the token that starts it included."""
    options = {"prefix_positions": 2, "suffix_positions": 1}
    model = wrapped("t5").double()
    labels = torch.tensor([[5, 9, 3, 2], [-100, -100, 8, 2], [7, 2, -100, -100], [-100, 4, 4, 2]])
    fresh = by_formula(model, "t5", options, columns_of(RIGHT), [[0], [0, 1, 2], [0], [0, 1]])
    batch = {"input_ids": IDS, "attention_mask": RIGHT.long(), "labels": labels}
    with torch.no_grad():
        assert gap(model(**batch).logits, fresh(**batch).logits) < 1e-9


def test_labels_of_tokens_are_no_prompt():
    base = models.bert_tokens()
    model, labels = wrapped(base), torch.full_like(IDS, -100)
    labels[:, 5:] = 1
    assert torch.equal(logits(model, labels=labels), logits(model))


@torch.no_grad()
def test_what_continues_a_cache_is_no_prompt():
    model, base = wrapped(), build("llama")
    first = model(input_ids=IDS[:, :7], use_cache=True)
    found = model(input_ids=IDS[:, 7:], past_key_values=copy.deepcopy(first.past_key_values)).logits
    assert torch.equal(found, base(input_ids=IDS[:, 7:], past_key_values=first.past_key_values).logits)
    assert gap(found, logits(model, prompt_lengths=[7] * 4)[:, 7:]) < 1e-5


# -- generate --------------------------------------------------------------------------------------------------------
HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20},
}


def written(model, mask=LEFT, base="llama", seed=3, ids=IDS, **how):
    """What the model writes, six tokens for each row."""
    torch.manual_seed(seed)
    call = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    return model.generate(input_ids=ids, attention_mask=mask.long(), **call)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@quiet
def test_generates_with_a_cache_what_it_does_without(base, places, how):
    model = wrapped(base, **PLACES[places])
    cached = written(model, **HOW[how])
    assert torch.equal(cached, written(model, use_cache=False, **HOW[how]))
    assert base == "gpt2" or not torch.equal(cached, written(build(base), **HOW[how]))


@pytest.mark.parametrize("places", PLACES)
@torch.no_grad()
@quiet
def test_generates_what_the_formula_says(places):
    """The fresh model reads everything anew for each token, changed at the prompt alone."""
    model = wrapped(**PLACES[places])
    fresh = by_formula(model, "llama", PLACES[places], columns_of(LEFT)).float()
    for module in fresh.modules():  # the hooks' tensors are float64
        assert all(p.dtype is torch.float32 for p in module.parameters(recurse=False))
    fresh = fresh.double()
    ids, mask = IDS, LEFT.long()
    for _ in range(6):
        out = fresh(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits[:, -1]
        out[:, 2] = -1e9  # not before six tokens
        ids, mask = torch.cat([ids, out.argmax(-1, keepdim=True)], 1), torch.cat([mask, mask[:, :1] | 1], 1)
    assert torch.equal(written(model), ids)


@quiet
def test_generates_row_by_row_what_it_does_in_a_batch():
    model = wrapped()
    together = written(model)
    for i, row in enumerate(LEFT):
        alone = written(model, mask=torch.ones(1, int(row.sum())), ids=IDS[i : i + 1, row])
        assert torch.equal(alone[0, -6:], together[i, -6:])


@quiet
def test_generates_without_being_given_a_mask():
    """generate tells padding by the pad token."""
    model, ids = wrapped(), IDS.masked_fill(~LEFT, 0)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, attention_mask=LEFT.long(), **how))


@quiet
def test_generates_with_a_static_cache():
    model = wrapped()
    assert torch.equal(written(model, cache_implementation="static", disable_compile=True), written(model))
    ids = IDS.masked_fill(~LEFT, 0)
    with pytest.raises(ValueError, match="Pass it as"):
        model.generate(ids, max_new_tokens=3, pad_token_id=0, cache_implementation="static", disable_compile=True)


@quiet
def test_generates_with_drafts_of_another_model():
    model, one = wrapped(), {"ids": IDS[:1], "mask": LEFT[:1]}
    drafted = written(model, assistant_model=build("llama"), **one)
    assert torch.equal(drafted, written(model, **one))
    assert torch.equal(written(model, prompt_lookup_num_tokens=2, **one), drafted)


@quiet
def test_refuses_a_prompt_in_parts():
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        written(wrapped(), prefill_chunk_size=4)


@pytest.mark.parametrize("how", HOW)
@quiet
def test_encoder_decoders_generate_with_a_cache_what_they_do_without(how):
    model = wrapped("t5")
    cached = written(model, RIGHT, **HOW[how])
    assert torch.equal(cached, written(model, RIGHT, use_cache=False, **HOW[how]))
    assert not torch.equal(cached, written(models.t5(), RIGHT, **HOW[how]))


@torch.no_grad()
@quiet
def test_encoder_decoders_generate_what_the_formula_says():
    model = wrapped("t5").double()
    options = {"prefix_positions": 2, "suffix_positions": 1}
    fresh = by_formula(model, "t5", options, columns_of(RIGHT), [[0]] * 4)
    decoded = torch.zeros(4, 1, dtype=torch.long)
    for _ in range(6):
        out = fresh(input_ids=IDS, attention_mask=RIGHT.long(), decoder_input_ids=decoded).logits[:, -1]
        out[:, 2] = -1e9
        decoded = torch.cat([decoded, out.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written(model, RIGHT), decoded)


# -- several adapters ------------------------------------------------------------------------------------------------
MIXED = ["default", "__base__", "second", "default"]


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5", "bert_classifier", "llama_classifier"])
def test_mixed_batches_are_row_by_row(base):
    model = with_second(base)
    mask = RIGHT if base == "t5" else LEFT
    together = logits(model, base, mask=mask, adapter_names=MIXED)
    for name in set(MIXED):
        alone = logits(model, base, mask=mask, adapter_names=name)
        assert all(gap(together[i], alone[i]) < 2e-6 for i, other in enumerate(MIXED) if other == name)
        for other in set(MIXED) - {name}:
            assert gap(alone, logits(model, base, mask=mask, adapter_names=other)) > 1e-2
    assert torch.equal(logits(model, base, mask=mask, adapter_names="__base__"), logits(build(base), base, mask=mask))


@pytest.mark.parametrize("how", ["greedy", "beams"])
@quiet
def test_mixed_batches_generate_row_by_row(how):
    model = with_second()
    together = written(model, adapter_names=MIXED, **HOW[how])
    for i, name in enumerate(MIXED):
        one = {"mask": LEFT[i : i + 1], "ids": IDS[i : i + 1]}
        assert torch.equal(together[i], written(model, adapter_names=[name], **one, **HOW[how])[0])


@quiet
def test_beside_lora():
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), lora, mixed=True)
    model.add_adapter("other", config())
    train_a_little(model.base_model, "other")
    model.eval()
    one = logits(model, mask=LEFT)
    model.set_adapter(["default", "other"])
    assert gap(logits(model, mask=LEFT), one) > 1e-2
    both = written(model)
    assert torch.equal(both, written(model, use_cache=False))
    model.set_adapter("other")
    alone = wrapped()
    tensors = {k.replace(".other", ".default"): v for k, v in model.state_dict().items() if "reft_" in k}
    assert alone.load_state_dict(tensors, strict=False).unexpected_keys == [] and len(tensors) == 6
    assert torch.equal(written(model), written(alone)) and not torch.equal(written(model), both)


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
    grads = []
    for checkpointing in (False, True):
        model = wrapped(base).train()
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        mask = RIGHT if base == "t5" else LEFT
        model(input_ids=IDS, attention_mask=mask.long(), labels=labelled(mask)[0], use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
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


def test_starting_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(build("llama"), config())(input_ids=IDS)
