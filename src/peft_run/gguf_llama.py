"""A GGUF file of a Llama model -> a plain, trainable transformers model and its fast tokenizer.

transformers can open GGUF files itself (`gguf_file=`), but the result carries a quantizer that refuses training and
saving. Here the weights are dequantized into a fresh LlamaForCausalLM, which is a model like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's names for how a text is split before BPE: the types of the steps, and their one setting.
PRE_TOKENIZERS = {
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "gpt-2": [("ByteLevel", True)],
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class GgufLlama:
    """One opened GGUF file."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        self._reader = gguf.GGUFReader(path)
        if self["general.architecture"] != "llama":
            raise RunError(f"{path.name} holds a `{self['general.architecture']}` model; only `llama` is supported.")

    def __getitem__(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        return self[key] if key in self._reader.fields else default

    def config(self) -> LlamaConfig:
        from transformers import LlamaConfig

        heads = self["llama.attention.head_count"]
        return LlamaConfig(
            vocab_size=len(self["tokenizer.ggml.tokens"]),
            hidden_size=self["llama.embedding_length"],
            intermediate_size=self["llama.feed_forward_length"],
            num_hidden_layers=self["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=self.get("llama.attention.head_count_kv", heads),
            max_position_embeddings=self["llama.context_length"],
            # The file stores float32; the shortest decimal gives back the 1e-05 the model was made with.
            rms_norm_eps=float(f"{self['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            rope_parameters={"rope_type": "default", "rope_theta": self.get("llama.rope.freq_base", 10000.0)},
            tie_word_embeddings=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            head_dim=self.get("llama.attention.key_length", self["llama.embedding_length"] // heads),
            bos_token_id=self.get("tokenizer.ggml.bos_token_id", None),
            eos_token_id=self.get("tokenizer.ggml.eos_token_id", None),
            pad_token_id=self.get("tokenizer.ggml.padding_token_id", None),
        )

    def model(self, dtype: torch.dtype) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaForCausalLM

        config = self.config()
        weights = {transformers_name(t.name): torch.from_numpy(self._weight(t, config)) for t in self._reader.tensors}
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model = LlamaForCausalLM(config)
        model.load_state_dict(weights)  # strict: a tensor too many or too few is an error that names it
        return model.to(dtype)

    def _weight(self, tensor: Any, config: LlamaConfig) -> np.ndarray:
        import gguf

        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            weight = unpermute_rope_rows(weight, config.num_attention_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = unpermute_rope_rows(weight, config.num_key_value_heads)
        return weight.copy()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE, after a rule of PRE_TOKENIZERS."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        kind = (self["tokenizer.ggml.model"], self.get("tokenizer.ggml.pre", None))
        if kind[0] != "gpt2" or kind[1] not in PRE_TOKENIZERS:
            known = " and ".join(f"('gpt2', {name!r})" for name in PRE_TOKENIZERS)
            raise RunError(f"{self.path.name} has a tokenizer of kind {kind}; only {known} are supported.")
        tokens = self["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in self.get("tokenizer.ggml.merges", [])]
        bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        steps = {
            "Digits": lambda: pre_tokenizers.Digits(individual_digits=True),
            "ByteLevel": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        }
        bpe.pre_tokenizer = pre_tokenizers.Sequence([steps[step]() for step, _ in PRE_TOKENIZERS[kind[1]]])
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(
            [token for token, kind in zip(tokens, self["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            **self._special_tokens(tokens),
            chat_template=self.get("tokenizer.chat_template", None),
            model_max_length=self["llama.context_length"],
            clean_up_tokenization_spaces=False,
        )

    def _special_tokens(self, tokens: list[str]) -> dict[str, str]:
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        ids = {ours: self.get(f"tokenizer.ggml.{theirs}_token_id", None) for ours, theirs in names.items()}
        return {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}


def transformers_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{leaf}"


def unpermute_rope_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows, transformers row i with row i + half: put each head's rows back."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [head, pair, (first, second), column]
    return pairs.swapaxes(1, 2).reshape(rows, columns)
