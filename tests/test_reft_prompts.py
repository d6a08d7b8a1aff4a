"""ReFT: what the prompt is in training and in generate, and adapters beside each other."""

from __future__ import annotations

import copy
import threading

import models
import pytest
import torch
from laws_table import gap, quiet, train_a_little
from reft_models import (
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


# -- what the prompt is ----------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("use_cache", [True, False])
@quiet
def test_threads_keep_their_prompts_apart(use_cache):
    """Each writes with its own adapter after prompts of its own length."""
    model, found = with_second(), {}
    jobs = {"default": (IDS, LEFT), "second": (IDS[:2, 3:], LEFT[:2, 3:]), "__base__": (IDS[:1, :4], RIGHT[:1, :4])}

    def write(name):
        ids, mask = jobs[name]
        return written(model, mask, ids=ids, adapter_names=name, use_cache=use_cache)

    def work(name):
        found[name] = [write(name) for _ in range(5)]

    wanted = {name: write(name) for name in jobs}
    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(row, wanted[name]) for name in jobs for row in found[name])
