"""The small functions around models: signatures, scalings, dtypes, offloading; and what transformers' loader needs."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, TrainableTokensConfig, get_peft_model


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(self.words(x)))


def test_signatures():
    from peft.helpers import update_forward_signature, update_signature

    model = get_peft_model(Small(), LoraConfig(target_modules=["a"]))
    update_forward_signature(model)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    x = torch.arange(3)
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    with pytest.raises(ValueError, match="foo"):
        update_signature(model, "foo")


def test_rescale_adapter_scale():
    from peft.helpers import rescale_adapter_scale

    base = Small()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["a"], init_lora_weights=False))
    x = torch.arange(3)
    adapted = model(x)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(x), base(x))
    assert torch.equal(model(x), adapted)
    with pytest.raises(TypeError), rescale_adapter_scale(model, "a"):
        pass
    with pytest.raises(ValueError), rescale_adapter_scale(base, 2):
        pass


def test_rescaling_reaches_mixed_batches():
    from peft.helpers import rescale_adapter_scale

    model = get_peft_model(Small(), LoraConfig(target_modules=["a"], init_lora_weights=False)).eval()
    model.add_adapter("two", LoraConfig(target_modules=["a"], init_lora_weights=False))
    x = torch.tensor([[1], [2]])
    with torch.no_grad():
        model(x, adapter_names=["default", "two"])
        with rescale_adapter_scale(model, 0.0), model.disable_adapter():
            base = model(x)
        with rescale_adapter_scale(model, 0.0):
            torch.testing.assert_close(model(x, adapter_names=["default", "two"]), base)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 1)])
def test_weights_stored_in_float8(layer):
    """diffusers' layerwise casting: modules hold float8 but for the time of their own forward."""
    from peft.helpers import disable_input_dtype_casting

    class Stored:
        def __init__(self, module):
            module.to(torch.float8_e4m3fn)
            module.register_forward_pre_hook(lambda m, args: m.to(torch.bfloat16) and None)
            module.register_forward_hook(lambda m, args, y: m.to(torch.float8_e4m3fn) and None)

    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    adapted = model.base_model.model[0]
    x = torch.randn(2, 4, 1, 1) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4)
    for module in (adapted.base_layer, adapted.lora_A.default, adapted.lora_B.default):
        module.to(torch.float8_e4m3fn).to(torch.bfloat16)
    want = model(x.bfloat16())
    for module in (adapted.base_layer, adapted.lora_A.default, adapted.lora_B.default):
        Stored(module)
    with torch.no_grad(), disable_input_dtype_casting(model):
        found = model(x.bfloat16())
    assert found.dtype is torch.bfloat16 and adapted.lora_A.default.weight.dtype is torch.float8_e4m3fn
    torch.testing.assert_close(found, want, atol=2e-2, rtol=2e-2)
    assert adapted.cast_input_dtype_enabled


def test_availability_checks_import_nothing():
    from peft import import_utils

    flags = {n: f for n, f in vars(import_utils).items() if n.startswith("is_")}
    assert len(flags) >= 20
    for flag in flags.values():
        assert isinstance(flag() if callable(flag) else flag, bool)


def test_set_trainable_and_freeze():
    from peft.utils import _freeze_adapter, _set_trainable

    model = Small()
    (wrapper,) = _set_trainable(model, "default", ["b"], inference_mode=False)
    assert model.b is wrapper
    assert {n for n, p in wrapper.named_parameters() if p.requires_grad} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }
    _freeze_adapter(model, "default")
    assert not any(p.requires_grad for p in wrapper.parameters())
    with pytest.raises(ValueError, match="zzz"):
        _set_trainable(model, "default", ["zzz"], inference_mode=False, strict_module_check=True)


def test_onload_layer():
    accelerate = pytest.importorskip("accelerate")
    from peft.tuners.tuners_utils import onload_layer

    model = get_peft_model(Small(), LoraConfig(target_modules=["a"], init_lora_weights=False))
    x = torch.arange(3)
    want = model(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    layer = model.base_model.model.a
    assert layer.base_layer.weight.is_meta
    with onload_layer(layer):
        assert not layer.base_layer.weight.is_meta
        layer.merge()
    assert layer.base_layer.weight.is_meta
    torch.testing.assert_close(model(x), want)


def test_kbit_training_of_other_dtypes():
    model = Small().half()
    assert peft.prepare_model_for_kbit_training(model) is model
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    model = Small().half()
    model.quantization_method, model.gradient_checkpointing_enable = "gptq", lambda **kwargs: None
    model.get_input_embeddings = lambda: model.words
    peft.prepare_model_for_kbit_training(model)
    assert model.words.weight.dtype is torch.float16 and model(torch.arange(3)).requires_grad


def test_trainable_tokens_alone():
    """The method by itself: its default target, and a head tied to it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    model = get_peft_model(transformers.LlamaForCausalLM(config), TrainableTokensConfig(token_indices=[1, 5]))
    assert model.peft_config["default"].target_modules == "model.embed_tokens"
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.embed_tokens.trainable_tokens_delta.default"
    ]
    keys = {
        "base_model.model.model.embed_tokens.trainable_tokens_delta",
        "base_model.model.lm_head.trainable_tokens_delta",
    }
    assert set(peft.get_peft_model_state_dict(model)) == keys
    ids = torch.tensor([[1, 2, 5]])
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.trainable_tokens_delta["default"].add_(1)
    want = model(input_ids=ids).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


# -- transformers' loader ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_adapter_files_through_transformers(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    base = transformers.LlamaForCausalLM(config)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.rand_like(p))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.tensor([[1, 2, 3]])
    plain = copy.deepcopy(base)
    info = plain.load_adapter(str(tmp_path), adapter_name="other")
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(plain(ids).logits, model(input_ids=ids).logits)


def test_fused_experts_are_refused():
    pytest.importorskip("transformers")
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    fuse = WeightConverter(
        [".experts.*.w1.weight", ".experts.*.w3.weight"],
        ".experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    for targets in (["q_proj", "w1"], ["experts.0.w3"]):
        with pytest.raises(ValueError, match="gate_up_proj"):
            build_peft_weight_mapping([fuse], "default", LoraConfig(target_modules=targets))
    mapping = build_peft_weight_mapping([fuse], "default", LoraConfig(target_modules=["q_proj"]))
    key = "base_model.model.model.layers.0.q_proj.lora_A.weight"
    for renaming in mapping:
        key, _ = renaming.rename_source_key(key)
    assert key == "model.layers.0.q_proj.lora_A.default.weight"
