"""aLoRA: which tokens of which sequences it acts on, in forward, generate, mixed batches and checkpointed training."""

from __future__ import annotations

import models
import pytest
import torch

import peft

IDS = torch.tensor([[1, 5, 9, 33, 12, 63, 8], [1, 17, 3, 3, 40, 22, 10], [3, 3, 9, 33, 3, 3, 8]])
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def config(tokens=(3, 3), **changes):
    return peft.LoraConfig(**{**CONFIG, "alora_invocation_tokens": list(tokens), **changes})


@torch.no_grad()
def train(model, name="default", seed=1000):
    """Move an adapter away from its start."""
    for i, layer in enumerate(model.base_model.layers.values()):
        for p in layer.adapters[name].parameters():
            p.add_(0.7 * models.noise(p.shape, seed + i))


def alora(tokens=(3, 3), **changes):
    torch.manual_seed(0)
    model = peft.get_peft_model(models.llama(), config(tokens, **changes))
    train(model)
    return model.eval()


@torch.no_grad()
def touched(model, ids=IDS, **call):
    """0 for each token that is, bit for bit, what the base model makes of it; 1 for the others."""
    found = model(input_ids=ids, **call).logits
    return (found != models.llama()(input_ids=ids).logits).any(-1).int().tolist()


def from_end(*counts, length=7):
    return [[0] * (length - k) + [1] * k for k in counts]


def test_acts_from_the_last_invocation_on():
    assert touched(alora()) == from_end(0, 5, 3)
    assert touched(alora([9])) == from_end(5, 0, 5)
    assert touched(alora([1])) == from_end(7, 7, 0)
    assert touched(alora([10])) == from_end(0, 1, 0)
    assert touched(alora(range(8))) == from_end(0, 0, 0)  # longer than the prompt


def test_there_it_is_the_lora():
    model = alora()
    plain = peft.get_peft_model(models.llama(), peft.LoraConfig(**CONFIG))
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(model))
    with torch.no_grad():
        wanted, found = plain.eval()(input_ids=IDS).logits, model(input_ids=IDS, alora_offsets=[7, None, 7]).logits
        torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offsets", [[None, 5, 3], [0, 5, 3], (-1, 5, 3), torch.tensor([0, 5, 3])])
def test_the_caller_may_say_where(offsets):
    assert touched(alora(), alora_offsets=offsets) == from_end(0, 5, 3)
    assert touched(alora(), IDS[:1], alora_offsets=[100]) == from_end(7)
    with pytest.raises(ValueError, match="one number a sequence"):
        touched(alora(), alora_offsets=[1, 2])


@torch.no_grad()
def test_embeddings_alone_do_not_say_where():
    model, embedded = alora(), models.llama().get_input_embeddings()(IDS)
    base = models.llama()(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="alora_offsets="):
        assert torch.equal(model(inputs_embeds=embedded).logits, base)
    found = model(inputs_embeds=embedded, alora_offsets=[None, 5, 3]).logits
    assert torch.equal(found, model(input_ids=IDS).logits)


def test_a_plain_adapter_beside_it_acts_everywhere():
    model = alora()
    model.add_adapter("plain", peft.LoraConfig(**CONFIG))
    train(model, "plain", 5000)
    assert touched(model) == from_end(0, 5, 3)
    model.set_adapter("plain")
    assert touched(model) == from_end(7, 7, 7) == touched(model, alora_offsets=[1, 1, 1])
    model.base_model.set_adapter(["default", "plain"])
    assert touched(model) == from_end(7, 7, 7)


@torch.no_grad()
def test_mixed_batches_give_each_row_its_own_adapter_and_place():
    model = alora()
    model.add_adapter("nine", config([9]))
    model.add_adapter("plain", peft.LoraConfig(**CONFIG))
    train(model, "nine", 5000)
    train(model, "plain", 6000)
    ids, names = IDS[[0, 1, 2, 2, 1]], ["nine", "default", "default", "__base__", "plain"]
    assert touched(model, ids, adapter_names=names) == from_end(5, 5, 3, 0, 7)
    assert touched(model, ids, adapter_names=names, alora_offsets=[1, 2, 3, 4, 5]) == from_end(1, 2, 3, 0, 7)
    mixed = model(input_ids=ids, adapter_names=names).logits
    for i, name in enumerate(names):
        alone = model(input_ids=ids[i : i + 1], adapter_names=[name]).logits[0]
        torch.testing.assert_close(mixed[i], alone, atol=1e-5, rtol=1e-5)


# -- generate --------------------------------------------------------------------------------------------------------
def greedy(model, ids, steps, **call):
    """What greedy decoding gives, computed from the whole sequence at each step."""
    start = call.pop("start", [None] * len(ids))
    for _ in range(steps):
        offsets = [None if s is None else ids.shape[1] - s for s in start]
        logits = model(input_ids=ids, alora_offsets=offsets, **call).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_generates_as_from_the_whole_sequence(cached):
    model, plain = alora(), models.llama()
    how = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, "eos_token_id": None, "pad_token_id": 0}
    wanted = greedy(model, IDS, 6, start=[None, 2, 4])
    found = model.generate(input_ids=IDS, **how)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain.generate(input_ids=IDS, **how))
    assert torch.equal(model.generate(IDS, alora_offsets=[None, 5, 3], **how), wanted)
    assert torch.equal(model.generate(IDS, adapter_names=["default"] * 3, **how), wanted)


@torch.no_grad()
def test_generates_with_the_bases_cache_of_what_comes_before():
    from transformers import DynamicCache

    model, cache = alora(), DynamicCache()
    models.llama()(input_ids=IDS[1:2, :2], past_key_values=cache)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(input_ids=IDS[1:2], **how)
    assert torch.equal(model.generate(input_ids=IDS[1:2], past_key_values=cache, **how), wanted)


@torch.no_grad()
def test_candidates_of_a_speculating_generate_come_after_the_prompt():
    model = alora([10])  # one token before the end: fewer than the candidates
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(input_ids=IDS[1:2], **how)
    assert torch.equal(model.generate(input_ids=IDS[1:2], prompt_lookup_num_tokens=4, **how), wanted)


@torch.no_grad()
def test_several_samples_of_a_prompt():
    model = alora()
    how = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2, "top_k": 1, "eos_token_id": None}
    found = model.generate(input_ids=IDS, pad_token_id=0, **how)
    assert torch.equal(found, greedy(model, IDS, 3, start=[None, 2, 4]).repeat_interleave(2, 0))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 4}])
def test_refuses_beams_and_chunks(options):
    from transformers import GenerationConfig

    model = alora()
    with pytest.raises(ValueError, match="not supported for aLoRA"):
        model.generate(input_ids=IDS, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="not supported for aLoRA"):
        model.generate(input_ids=IDS, generation_config=GenerationConfig(max_new_tokens=2, **options))
    model.add_adapter("plain", peft.LoraConfig(**CONFIG))
    model.set_adapter("plain")
    model.generate(input_ids=IDS, max_new_tokens=2, **options)


# -- training --------------------------------------------------------------------------------------------------------
def step(model):
    """The loss and all gradients; two forwards before the backward of the first would need two offsets."""
    loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_checkpointing_gives_the_same_gradients(reentrant):
    loss, wanted = step(alora())
    model = alora()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found_loss, found = step(model)
    assert torch.equal(found_loss, loss)
    for name, g in wanted.items():
        assert g.abs().sum() > 0
        torch.testing.assert_close(found[name], g, msg=name)


# -- what it refuses -------------------------------------------------------------------------------------------------
def test_needs_the_whole_call():
    model = alora()
    with pytest.raises(ValueError, match="Call that"):
        model.base_model.model(input_ids=IDS)
    with model.disable_adapter():
        assert touched(model.base_model.model) == from_end(0, 0, 0)


def test_works_in_a_mixed_model():
    model = peft.get_peft_model(models.llama(), config(), mixed=True)
    with torch.no_grad():
        for layer in model.base_model.layers.values():
            layer.lora_B["default"].weight.fill_(0.1)
    assert touched(model.eval()) == from_end(0, 5, 3)


def test_refuses_layers_whose_input_is_no_sequence():
    model = peft.get_peft_model(models.build("mlp"), config(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="lin0 got an input of shape"):
        model(models.noise((6, models.WIDTH), 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "names no token"),
        ({"task_type": "SEQ_CLS"}, "task_type='CAUSAL_LM' only"),
        ({"use_dora": True}, "use_dora and alora_invocation_tokens exclude each other"),
        ({"use_bdlora": {"nblocks": 2}}, "alora_invocation_tokens and use_bdlora exclude"),
        ({"init_lora_weights": "mica"}, "mica"),
    ],
)
def test_configs_that_it_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("target", ["embed_tokens", "conv2"])
def test_layers_that_it_refuses(target):
    base = models.build("convs") if target == "conv2" else models.llama()
    before = [(n, type(m)) for n, m in base.named_modules()]
    with pytest.raises(ValueError, match="ALora adapts layers of the kinds linear"):
        peft.get_peft_model(base, config(target_modules=[target]))
    assert [(n, type(m)) for n, m in base.named_modules()] == before


def test_is_no_lora_to_convert_to_or_combine():
    model = alora()
    model.add_adapter("plain", peft.LoraConfig(**CONFIG))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, 4)
    for how in ("cat", "svd", "linear"):
        with pytest.raises(ValueError, match="'default' is an aLoRA"):
            model.add_weighted_adapter(["plain", "default"], [1, 1], "both", how)
