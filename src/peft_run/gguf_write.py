"""A Llama model of transformers -> a GGUF file, F16 or Q8_0, for llama.cpp and Ollama: the inverse of gguf_llama.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.errors import UsageError
from peft_run.gguf_llama import LAYER_TENSORS, MODEL_TENSORS, PRE_TOKENIZERS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TYPES = ("F16", "Q8_0")
BLOCK = 32  # Q8_0 quantizes so many numbers of a row together


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], path: Path, kind: str, name: str
) -> None:
    """Write one file. Raises UsageError for models and tokenizers that this writer does not know."""
    import gguf

    config = model.config
    check(config)
    writer = gguf.GGUFWriter(path, "llama")
    add_settings(writer, config, kind, name)
    add_tokenizer(writer, tokenizer, stop_ids, config.vocab_size)
    names = {theirs: ours for ours, theirs in MODEL_TENSORS.items()}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.detach().float().cpu()
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
            data = permute_rope_rows(data, heads)
        add_tensor(writer, names.get(key) or layer_name(key), data.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config: Any) -> None:
    rope = config.rope_parameters.get("rope_type", "default")
    odd = (
        {
            "model_type": (config.model_type, "llama"),
            "rope_type": (rope, "default"),
            "attention_bias": (config.attention_bias, False),
            "mlp_bias": (config.mlp_bias, False),
        }
        if config.model_type == "llama"
        else {"model_type": (config.model_type, "llama")}
    )
    if wrong := [f"{field}={found!r}" for field, (found, known) in odd.items() if found != known]:
        raise UsageError("deploy.no_gguf", what=", ".join(wrong))


def add_settings(writer: Any, config: Any, kind: str, name: str) -> None:
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], size: int) -> None:
    """Byte-level BPE with its special tokens and its chat template."""
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(state)
    if state["model"]["type"] != "BPE" or pre is None:
        raise UsageError("deploy.no_gguf", what=f"a tokenizer of the type {state['model']['type']}")
    kinds = gguf.TokenType
    added = {t["id"]: kinds.CONTROL if t["special"] else kinds.USER_DEFINED for t in state["added_tokens"]}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [added.get(i, kinds.NORMAL if i in by_id else kinds.UNUSED) for i in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    end, *others = stop_ids or [tokenizer.eos_token_id]
    writer.add_eos_token_id(end)
    if others:
        writer.add_eot_token_id(others[0])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token is not None:
            add(token)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(state: dict[str, Any]) -> str | None:
    """What llama.cpp calls a tokenizer's rule for splitting text; None for rules that this file does not know."""
    if state["normalizer"] is not None or state["pre_tokenizer"] is None:
        return None
    steps = state["pre_tokenizer"].get("pretokenizers", [state["pre_tokenizer"]])
    shape = [(step["type"], step.get("individual_digits", step.get("use_regex"))) for step in steps]
    plain = not any(step.get("add_prefix_space") for step in steps)
    return next((name for name, known in PRE_TOKENIZERS.items() if plain and shape == known), None)


def add_tensor(writer: Any, name: str, data: np.ndarray, kind: str) -> None:
    """Matrices in the file's type, vectors (norms) in float32."""
    import gguf
    import numpy

    if data.ndim < 2:
        writer.add_tensor(name, data)
    elif kind == "Q8_0" and data.shape[-1] % BLOCK == 0:
        quantized = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
    else:
        writer.add_tensor(name, data.astype(numpy.float16))


def layer_name(key: str) -> str:
    """`model.layers.7.self_attn.q_proj.weight` -> `blk.7.attn_q.weight`."""
    layer, _, rest = key.removeprefix("model.layers.").partition(".")
    part, _, leaf = rest.rpartition(".")
    ours = next((ours for ours, theirs in LAYER_TENSORS.items() if theirs == part), None)
    if ours is None:
        raise UsageError("deploy.no_gguf", what=f"a Llama with {key}")
    return f"blk.{layer}.{ours}.{leaf}"


def permute_rope_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers rotates row i with row i + half, llama.cpp neighbouring rows: lay each head's rows out so."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)  # [head, (first, second), pair, column]
    return halves.swapaxes(1, 2).reshape(rows, columns).contiguous()
