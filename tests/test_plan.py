"""plan: what it counts against closed forms, against really wrapped models, and over every method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft
from peft import LoraConfig, get_peft_model, registry
from peft.errors import ConfigError

transformers = pytest.importorskip("transformers")
WIDTH, LAYERS, VOCABULARY = 32, 2, 64
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama_config(**changes):
    return transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            **changes,
        }
    )


# What a method needs beside its targets; arguments of each forward under "inputs".
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 2, "subspace_rank": 1},
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "BOTTLENECK": {"target_modules": None},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "POLY": {"n_tasks": 2, "n_skills": 2, "inputs": {"task_ids": torch.tensor([0, 0])}},
    "PSOFT": {"r": 8},
    "REFT": {"target_modules": None},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "WAVEFT": {"n_frequency": 10},
    "MISS": {"r": 8},
    "ROAD": {"group_size": 8},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2, "inputs": {"task_ids": torch.tensor([0, 0])}},
}
MADE_OF_OTHERS = {"FUSION", "XLORA"}  # their settings name adapters that are there already


def config_of(name):
    """(config, further arguments of a forward) of a method on the tiny Llama."""
    cls = registry.method(name).config
    known = {field for base in cls.__mro__ for field in getattr(base, "__dataclass_fields__", {})}
    settings = {"task_type": "CAUSAL_LM"}
    if "num_virtual_tokens" in known and name != "CPT":
        settings["num_virtual_tokens"] = 4
    if "target_modules" in known:
        settings["target_modules"] = TARGETS
    settings |= SETTINGS.get(name, {})
    inputs = settings.pop("inputs", None)
    return cls(**settings), inputs


def really_wrapped(config, **changes):
    torch.manual_seed(0)
    return get_peft_model(transformers.LlamaForCausalLM(llama_config(**changes)), config)


@pytest.mark.parametrize("name", sorted(registry.names() - MADE_OF_OTHERS))
def test_every_method_is_planned_and_trains_what_get_peft_model_trains(name):
    config, inputs = config_of(name)
    plan = peft.plan(llama_config(), config, batch=2, length=8, inputs=inputs, device="cpu")
    trained, total = really_wrapped(config_of(name)[0]).get_nb_trainable_parameters()
    assert (plan.trained, plan.total) == (trained, total)
    assert plan.optimizer == 8 * trained
    assert plan.peak > plan.weights + plan.optimizer


@pytest.mark.parametrize("name", ["FOURIERFT", "SHIRA", "WAVEFT"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_plan_made_without_values_is_not_met_again(name, device):
    config, inputs = config_of(name)
    config.n_frequency = 8  # so few that x is transformed, not a weight
    peft.plan(llama_config(), config, batch=2, length=8, inputs=inputs, device=device)
    model = really_wrapped(config)
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_names_of_methods_are_registered():
    assert set(SETTINGS) <= registry.names() and registry.names() >= MADE_OF_OTHERS


# -- closed forms -----------------------------------------------------------------------------------------------------
class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 256), nn.Linear(256, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


ROWS = 100


def planned(config=None, **more):
    return peft.plan(Layers(), config, inputs={"x": torch.empty(ROWS, 64)}, device="cpu", **more)


def test_full_fine_tuning_in_closed_form():
    numbers = 64 * 256 + 256 + 256 * 8 + 8
    plan = planned()
    assert (plan.trained, plan.total, plan.weights) == (numbers, numbers, 4 * numbers)
    assert (plan.gradients, plan.optimizer) == (4 * numbers, 8 * numbers)
    assert plan.activations == 4 * ROWS * 256  # relu's output, which it and the second layer share
    assert plan.peak >= plan.weights + plan.gradients + plan.optimizer


def test_lora_keeps_the_small_product_and_one_byte_an_element_for_dropout():
    rank = 4
    config = LoraConfig(target_modules=["a"], r=rank)
    plain, dropped = planned(config), planned(LoraConfig(target_modules=["a"], r=rank, lora_dropout=0.5))
    assert plain.trained == rank * (64 + 256)
    assert plain.activations == 4 * ROWS * (256 + rank)
    assert dropped.activations - plain.activations == ROWS * 64


def test_optimizers():
    full = planned()
    assert planned(optimizer="sgd").optimizer == 0
    eight = 2 * (64 * 256 + 4 * 64) + 8 * (256 + 256 * 8 + 8)  # tensors of less than 4096 numbers stay in float32
    assert planned(optimizer="adamw_8bit").optimizer == eight
    assert planned(optimizer="adamw_fused").peak <= full.peak
    with pytest.raises(ConfigError, match="adamw"):
        planned(optimizer="adamv")


@pytest.mark.parametrize(
    ("storage", "size"),
    [("nf4", lambda n, out: n / 2 + n / 64 * 4), ("nf4_double", lambda n, out: n / 2 + n / 64 + 4 * -(-n // 16384)),
     ("int8", lambda n, out: n + 4 * out)],
)  # fmt: skip
def test_quantized_weights(storage, size):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = transformers.LlamaForCausalLM(llama_config())
    linears = [m.weight for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    plan = peft.plan(llama_config(), config, length=8, quantization=storage, device="cpu")
    packed = sum(size(W.numel(), W.shape[0]) for W in linears)
    full = peft.plan(llama_config(), config, length=8, device="cpu")
    assert plan.weights == full.weights - sum(W.nbytes for W in linears) + packed
    assert (plan.trained, plan.total) == (full.trained, full.total)
    with pytest.raises(ConfigError, match="nf4"):
        peft.plan(llama_config(), config, quantization="nf5")


def test_groups_tell_method_heads_and_token_rows_apart():
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM"
    )
    plan = peft.plan(llama_config(), config, length=8)
    found = {group.kind: (group.name, group.numbers) for group in plan.trainable}
    assert found == {
        "method": ("model.layers.*.self_attn.q_proj", LAYERS * 8 * 2 * WIDTH),
        "token rows": ("model.embed_tokens", 2 * WIDTH),
        "head": ("lm_head", VOCABULARY * WIDTH),
    }
    assert {group.kind for group in peft.plan(llama_config(), length=8).trainable} == {"weights"}


# -- sizes ------------------------------------------------------------------------------------------------------------
LORA = LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.1)


@pytest.fixture(scope="module")
def tiny_plan():
    return peft.plan(llama_config(), LORA, batch=2, length=16, device="cpu")


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 9), length=st.integers(2, 40))
def test_more_takes_more(tiny_plan, batch, length):
    here = tiny_plan.at(batch, length)
    for more in (here.at(batch=batch + 1), here.at(length=length + 1)):
        assert more.peak >= here.peak and more.activations > here.activations and more.logits > here.logits
        assert (more.weights, more.trainable, more.optimizer) == (here.weights, here.trainable, here.optimizer)


@pytest.mark.parametrize("what", ["batch", "length"])
def test_the_largest_fits_and_one_more_does_not(tiny_plan, what):
    memory = 3 * tiny_plan.peak
    most = tiny_plan.largest(what, memory)
    assert most > getattr(tiny_plan, what)
    assert tiny_plan.at(**{what: most}).peak <= memory < tiny_plan.at(**{what: most + 1}).peak
    assert tiny_plan.largest(what, memory, most=most - 1) == most - 1
    assert tiny_plan.largest(what, tiny_plan.weights) == 0


def test_checkpointing_and_accumulation():
    deep = llama_config(num_hidden_layers=8)
    plain = peft.plan(deep, LORA, batch=4, length=64, device="cpu")
    less = peft.plan(deep, LORA, batch=4, length=64, gradient_checkpointing=True, device="cpu")
    assert less.activations < plain.activations / 3 and less.peak < plain.peak
    twice = peft.plan(deep, batch=4, length=64, accumulate=2, device="cpu")
    once = peft.plan(deep, batch=4, length=64, device="cpu")
    assert once.peak < twice.peak <= once.peak + once.gradients


def test_attention_keeps_no_weights_where_torch_keeps_none():
    """Quadratic in the length only where the model says that it computes attention itself."""

    def growth(attention):
        config = llama_config()
        config._attn_implementation = attention
        plan = peft.plan(config, LORA, length=64, device="cpu")
        long, longer = plan.at(length=512).activations, plan.at(length=1024).activations
        return longer / long

    assert growth("sdpa") == pytest.approx(2, rel=0.01)
    assert growth("eager") > 3


# -- where a model comes from -----------------------------------------------------------------------------------------
def test_folder_config_and_live_model_are_one(tmp_path):
    model = transformers.LlamaForCausalLM(llama_config())
    model.save_pretrained(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plans = [peft.plan(source, LORA, length=8, device="cpu") for source in (model, model.config, tmp_path)]
    assert plans[0] == plans[1] == plans[2]
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert peft.plan(get_peft_model(model, LORA), length=8, device="cpu") == plans[0]


def test_what_cannot_be_planned_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        peft.plan(tmp_path)
    with pytest.raises(ConfigError, match="inputs"):
        peft.plan(Layers())
    with pytest.raises(ConfigError, match="Nothing is trained"):
        planned_model = Layers().requires_grad_(False)
        peft.plan(planned_model, inputs={"x": torch.empty(1, 64)})
    with pytest.raises(ConfigError, match="bf16"):
        peft.plan(llama_config(), dtype="bf17")
    with pytest.raises(peft.NoMatchingPeftModuleError):
        peft.plan(llama_config(), LoraConfig(target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("task", "auto"),
    [("SEQ_CLS", "LlamaForSequenceClassification"), ("TOKEN_CLS", "LlamaForTokenClassification"),
     ("QUESTION_ANS", "LlamaForQuestionAnswering"), ("FEATURE_EXTRACTION", "LlamaModel")],
)  # fmt: skip
def test_tasks(task, auto):
    config = LoraConfig(target_modules=["q_proj"], task_type=task)
    plan = peft.plan(llama_config(), config, batch=3, length=8)
    model = get_peft_model(getattr(transformers, auto)(llama_config()), config)
    assert (plan.trained, plan.total) == model.get_nb_trainable_parameters()


def test_encoder_decoder():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    plan = peft.plan(config, LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"), length=8)
    assert plan.trained and plan.activations


def test_a_twelve_billion_model_as_the_documents_say():
    """The figures of docs/planning.md: full fine-tuning does not fit into 80 GB, LoRA does."""
    config = transformers.MistralConfig(
        vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    full = peft.plan(config, dtype="bf16", batch=1, length=512)
    small = peft.plan(config, lora, dtype="bf16", batch=1, length=512)
    assert full.total == 12_247_782_400
    assert full.peak > 80e9 > small.peak
