"""What every case works on: a model of SmolLM2-135M's shape, its adapters and its inputs, all from fixed formulas.

Both environments build the same tensors from the same seeds, so nothing is downloaded and nothing is copied between
them. Only the functions that need the library under test import it, so that import time can be measured elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK = 16
ALPHA = 32
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_COUNT = 17

_weights: dict[str, dict[str, torch.Tensor]] = {}


def model_config():
    from transformers import LlamaConfig

    layers = int(os.environ.get("BENCHMARK_LAYERS", SHAPE["num_hidden_layers"]))
    return LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})


def empty_model(dtype: str):
    """The architecture without storage; `base_model` puts weights in."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(), dtype=DTYPES[dtype])


def base_weights(dtype: str) -> dict[str, torch.Tensor]:
    if dtype not in _weights:
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, parameter in empty_model("fp32").named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            weights[name] = (values + 1 if name.endswith("norm.weight") else values).to(DTYPES[dtype])
        _weights[dtype] = weights
    return _weights[dtype]


def base_model(dtype: str, *, own_weights: bool = False):
    """A base model. All of them share one copy of the weights, unless the case is going to change them.

    dtype: "bf16+nf4" and the like store the linear layers of the decoder with bitsandbytes.
    """
    dtype, _, storage = dtype.partition("+")
    if storage:
        return quantized_model(dtype, storage)
    weights = base_weights(dtype)
    if own_weights:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    model = empty_model(dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are not in the state dict
    return model.requires_grad_(False).eval()


def quantize(model, storage: str, dtype: torch.dtype, device: str = "cpu"):
    """The model with its linear layers but the last in "nf4", "fp4", "nf4_double" or "int8"."""
    import bitsandbytes

    for path, linear in list(model.named_modules()):
        if type(linear) is not torch.nn.Linear or path == "lm_head":
            continue
        shape = linear.in_features, linear.out_features, False
        if storage == "int8":
            made = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        else:
            double = storage.endswith("double")
            made = bitsandbytes.nn.Linear4bit(
                *shape, compute_dtype=dtype, compress_statistics=double, quant_type=storage[:3]
            )
        made.load_state_dict(linear.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made.to(device))
    return model


def quantized_model(dtype: str, storage: str):
    """The base model with linear layers in 4 or 8 bits, flagged as transformers does it."""
    # bitsandbytes' own default is double quantization
    model = quantize(base_model(dtype), storage if storage == "int8" else f"{storage}_double", DTYPES[dtype])
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = storage == "int8", storage != "int8"
    return model.requires_grad_(False).eval()


def rounded_base_model():
    """An fp32 model with the bf16 model's weights: the reference for bf16 results."""
    model = base_model("fp32", own_weights=True)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(base_weights("bf16")[name])
    return model


def want_embedding_gradient(model):
    """Make a frozen model run its whole backward, as it has to under an adapter in every layer."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return model


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=generator)


def lora_config(dropout: float = 0.0, dora: bool = False):
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules="all-linear",
    )


def adapted_model(
    dtype: str, dropout: float = 0.0, dora: bool = False, own_weights: bool = False, prepare: bool = False
):
    """A wrapped model with adapter weights that are not zero, ready to train."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    base = base_model(dtype, own_weights=own_weights)
    if prepare:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, lora_config(dropout, dora))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(adapter_values(parameter.shape, generator))
    return model


def adapter_values(shape, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * (0.05 if shape[0] == RANK else 0.01)


def adapter_directory(scratch: str, index: int, dora: bool = False) -> str:
    return str(Path(scratch) / (f"dora_{index}" if dora else f"lora_{index}"))


def write_adapters(scratch: str) -> None:
    """The checkpoints that both contenders load, in upstream's format."""
    for index in range(ADAPTER_COUNT):
        write_adapter(adapter_directory(scratch, index), seed=100 + index, dora=False)
    write_adapter(adapter_directory(scratch, 0, dora=True), seed=100, dora=True)


def write_adapter(directory: str, seed: int, dora: bool) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in base_weights("fp32").items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEAR_NAMES):
            continue
        out_features, in_features = weight.shape
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = adapter_values((RANK, in_features), generator)
        tensors[f"{key}.lora_B.weight"] = adapter_values((out_features, RANK), generator)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.linalg.vector_norm(weight, dim=1) * 1.05
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora,
        "target_modules": list(LINEAR_NAMES),
    }
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir(parents=True)
    save_file(tensors, Path(directory) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(directory) / "adapter_config.json").write_text(json.dumps(config, indent=2))


def model_with_adapters(dtype: str, scratch: str, count: int):
    """A model for inference with the first `count` checkpoints loaded as adapters "0", "1", ..."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model(dtype), adapter_directory(scratch, 0), adapter_name="0")
    for index in range(1, count):
        model.load_adapter(adapter_directory(scratch, index), adapter_name=str(index))
    return model.eval()
