"""layer_replication: a deeper model from shared weights, each layer with an adapter of its own."""

from __future__ import annotations

import models
import pytest
import torch

from peft import LoraConfig, PeftModel, get_peft_model
from peft.methods.lora.replicate import replicate_layers

SPANS = [(0, 2), (0, 2)]


def replicated(base=None, targets=("q_proj", "v_proj"), spans=SPANS, **config) -> PeftModel:
    model = models.build("llama") if base is None else base
    model = get_peft_model(model, LoraConfig(target_modules=list(targets), layer_replication=spans, **config))
    models.perturb(model, scale=0.3)
    return model.eval()


def test_layers_share_weights_but_not_adapters():
    model = replicated()
    first, second = model.base_model.model.model.layers[0], model.base_model.model.model.layers[2]
    assert first is not second
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight
    assert first.self_attn.q_proj.base_layer.weight is second.self_attn.q_proj.base_layer.weight
    assert not first.self_attn.q_proj.lora_A["default"].weight.equal(second.self_attn.q_proj.lora_A["default"].weight)
    assert [layer.self_attn.layer_idx for layer in model.base_model.model.model.layers] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4
    assert first.self_attn.config is model.config is second.self_attn.config


def test_it_computes_what_a_really_deeper_model_does():
    model = replicated()
    deep = models.llama(num_hidden_layers=4)
    source = models.build("llama").state_dict()
    deep.load_state_dict(
        {k: source[k.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")] for k in deep.state_dict()}
    )
    with model.disable_adapter():
        assert models.run(model, "llama").equal(models.run(deep, "llama"))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_merging_is_right_and_leaves_the_shared_weight_alone(config):
    """Upstream's merge wrote both adapters into the one weight."""
    model = replicated(**config)
    want = models.run(model, "llama")
    layers = model.base_model.model.model.layers
    shared, before = layers[0].self_attn.q_proj.base_layer.weight, models.build("llama").state_dict()
    model.merge_adapter()
    torch.testing.assert_close(models.run(model, "llama"), want)
    model.unmerge_adapter()
    assert all(layers[i].self_attn.q_proj.base_layer.weight is shared for i in (0, 2))
    assert shared.equal(before["model.layers.0.self_attn.q_proj.weight"])
    torch.testing.assert_close(models.run(model.merge_and_unload(), "llama"), want)


def test_generation_with_a_cache_is_generation_without():
    model, ids = replicated(), torch.tensor([[1, 5, 9]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(input_ids=ids, use_cache=c, **options) for c in (True, False))
    assert cached.equal(plain)


def test_layer_types_follow():
    """Caches take the kind of each layer from the config."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kinds = ["full_attention", "sliding_attention"]
    config = Qwen3Config(
        **{**models.llama_config().to_dict(), "model_type": "qwen3", "head_dim": 4, "layer_types": kinds},
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    model = replicated(models.fill(Qwen3ForCausalLM(config)), spans=[(0, 2), (1, 2)])
    assert model.config.layer_types == [*kinds, "sliding_attention"]
    ids = torch.tensor([[1, 5, 9, 4, 6, 7]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(input_ids=ids, use_cache=c, **options) for c in (True, False))
    assert cached.equal(plain)


def test_saved_and_loaded(tmp_path):
    model = replicated()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert models.run(loaded, "llama").equal(models.run(model, "llama"))


def test_more_adapters():
    """One for the same layers joins; one for others is refused. Upstream replicated again and lost the first."""
    model = replicated()
    want = models.run(model, "llama")
    for name, config in {"same": {"layer_replication": SPANS}, "none": {}}.items():
        model.add_adapter(name, LoraConfig(target_modules=["q_proj"], **config))
    assert len(model.base_model.model.model.layers) == 4
    assert models.run(model, "llama").equal(want)
    with pytest.raises(ValueError, match="fresh base model"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1)]))
    assert list(model.peft_config) == ["default", "same", "none"]


def falcon():
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4))


@pytest.mark.parametrize(
    ("base", "target"),
    [(models.bert_classifier, "query"), (models.bert_tokens, "query"), (falcon, "query_key_value")],
)
def test_other_layouts(base, target):
    model = replicated(base(), [target])
    assert len(model.base_model.layers) == model.config.num_hidden_layers == 4
    assert models.run(model, "llama").isfinite().all()


def test_only_training_reaches_the_adapters():
    model = replicated().train()
    model(**models.inputs("llama")).logits.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 4 * 2 * 2
    assert all("lora_" in n and g.abs().sum() > 0 for n, g in grads.items())


@pytest.mark.parametrize("spans", [[(0, 3)], [(1, 1)], [(-1, 1)], []])
def test_spans_outside_of_the_model(spans):
    model = models.build("llama")
    with pytest.raises(ValueError, match="spans"):
        replicate_layers(model, spans)
    assert len(model.model.layers) == 2


def test_unknown_layouts():
    with pytest.raises(ValueError, match="Could not locate the layers"):
        replicate_layers(models.build("t5"), SPANS)
