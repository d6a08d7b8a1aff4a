"""Which methods convert to LoRA: those that Hugging Face PEFT 0.21.2 converts, and what they become."""

from __future__ import annotations

import models
import pytest
import torch
from laws_table import EXAMPLES, quiet, train_a_little, wrapped

import peft
from peft.methods.lora.convert import convert_to_lora

# What `supports_lora_conversion` says there, of adapters on linear layers.
CONVERTED = {"LORA", "LOHA", "LOKR", "C3A", "DELORA", "FOURIERFT", "GRALORA", "MISS", "PSOFT", "RANDLORA", "TINYLORA"}
CONVERTED |= {"UNILORA", "VBLORA", "VERA", "WAVEFT"}
FIRST = {e.method: e for e in reversed(EXAMPLES) if e.base in ("mlp", "no_bias", "sequence")}
VARIANT_FIELDS = {"alora_invocation_tokens", "kasa_config", "arrow_config"}
TRANSPOSED = [e for e in EXAMPLES if e.base == "transposed" and e.method in CONVERTED]
TRANSPOSED = [e for e in TRANSPOSED if not VARIANT_FIELDS & set(e.config)]


@pytest.mark.parametrize("method", FIRST)
@quiet
def test_the_same_methods_convert(method):
    model = wrapped(FIRST[method])
    assert model.supports_lora_conversion() is (method in CONVERTED)
    if method in CONVERTED:
        config, tensors = convert_to_lora(model, 2)
        assert (config.r, config.lora_alpha, config.use_dora) == (2, 2, False)
        assert {k.rpartition("lora_")[2] for k in tensors} >= {"A.weight", "B.weight"}
    else:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, 2)


def test_every_method_of_layers_is_in_the_list():
    assert set(FIRST) >= CONVERTED


@pytest.mark.parametrize("example", TRANSPOSED, ids=str)
@quiet
def test_transposed_layers_convert_too(example):
    """There FourierFT and WaveFT on a Conv1D are refused."""
    model, x = wrapped(example), example.inputs()
    wanted = model(x)
    config, tensors = convert_to_lora(model, 12)
    assert config.fan_in_fan_out
    found = peft.get_peft_model(example.make_base(), config)
    peft.set_peft_model_state_dict(found, tensors)
    torch.testing.assert_close(found.eval()(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["emb", "lin"], "peft_type": "TINYLORA", "base": "embedded"},
        {"target_modules": ["emb"], "peft_type": "LORA", "base": "embedded"},
        {"target_modules": ["conv1"], "peft_type": "LOHA", "base": "convs"},
        {"target_modules": ["conv2"], "peft_type": "LOKR", "base": "convs"},
        {"target_modules": ["mha"], "peft_type": "LORA", "base": "attention"},
        {"target_parameters": ["experts.w1"], "target_modules": [], "peft_type": "LORA", "base": "parameters"},
    ],
    ids=lambda o: f"{o['peft_type']} {o['base']}",
)
@quiet
def test_layers_that_are_not_linear_say_so_before_and_after(options):
    """There a TinyLoRA on an embedding gives a file whose keys no LoRA on an embedding has."""
    options = dict(options)
    base = options.pop("base")
    model = peft.get_peft_model(models.build(base), peft.get_peft_config(options))
    train_a_little(model)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 2)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "AdaptionPromptConfig"])
@quiet
def test_prompts_have_no_layer_to_convert(kind):
    own = {"num_virtual_tokens": 2} if kind.startswith("Prompt") else {"adapter_len": 2, "adapter_layers": 1}
    model = peft.get_peft_model(models.build("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **own))
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"Could not detect any layer that supports LoRA conversion: [A-Z_]+ adapts"):
        convert_to_lora(model, 2)
