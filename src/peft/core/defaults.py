"""Default target modules by model type: data only. The dicts are open: a program may add its own model types."""

QV = ("q_proj", "v_proj")
FUSED_QKV = ("query_key_value",)
QUERY_VALUE = ("query", "value")

LORA_TARGETS = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "bart": QV,
    "gpt2": ("c_attn",),
    "bloom": FUSED_QKV,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "opt": QV,
    "gptj": QV,
    "gpt_neox": FUSED_QKV,
    "gpt_neo": QV,
    "bert": QUERY_VALUE,
    "roberta": QUERY_VALUE,
    "xlm-roberta": QUERY_VALUE,
    "electra": QUERY_VALUE,
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "layoutlm": QUERY_VALUE,
    "llama": QV,
    "llama4": QV,
    "chatglm": FUSED_QKV,
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "RefinedWebModel": FUSED_QKV,
    "RefinedWeb": FUSED_QKV,
    "falcon": FUSED_QKV,
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "mistral": QV,
    "mixtral": QV,
    "stablelm": QV,
    "phi": (*QV, "fc1", "fc2"),
    "gemma": QV,
    "gemma2": QV,
    "gemma3_text": QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": QV,
    "qwen3": QV,
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
LORA_TARGETS = {model: names if isinstance(names, str) else list(names) for model, names in LORA_TARGETS.items()}


def changed(table=LORA_TARGETS, without=(), **changes):
    """A copy of a table with other values for some model types (`_` in a keyword stands for `-`), and without some."""
    return {
        **{k: v for k, v in table.items() if k not in without},
        **{k.replace("deberta_v2", "deberta-v2"): [*v] for k, v in changes.items()},
    }


# Methods that are not in this file have LoRA's targets.
EVERY_PROJECTION = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
OPT_LIKE = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RECENT = [
    "blip-2",
    "xlm-roberta",
    "electra",
    "layoutlm",
    "chatglm",
    "mpt",
    "RefinedWebModel",
    "RefinedWeb",
    "falcon",
    "btlm",
    "codegen",
    "mistral",
    "mixtral",
    "stablelm",
    "phi",
    "rwkv",
    "rwkv7",
]
VBLORA_TARGETS = changed(
    without=RECENT,
    t5=("q", "k", "v", "o", "wi", "wo"),
    mt5=("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    bart=OPT_LIKE,
    opt=OPT_LIKE,
    deberta_v2=("query_proj", "key_proj", "value_proj", "dense"),
)
ADALORA_TARGETS = changed(VBLORA_TARGETS, roberta=("query", "key", "value", "dense"))
ADAMSS_TARGETS = changed(vit=QUERY_VALUE)
SHIRA_TARGETS = VERA_TARGETS = changed(phi=QV)
FROD_TARGETS = changed(phi=QV, vit=QUERY_VALUE)
PVERA_TARGETS = changed(phi=QV, dinov2=QUERY_VALUE)
C3A_TARGETS = FOURIERFT_TARGETS = changed(gpt2=("mlp.c_proj",), gpt_bigcode=("mlp.c_proj",))
WAVEFT_TARGETS = changed(FOURIERFT_TARGETS, without=("btlm", "rwkv", "rwkv7"))
VALUE_ONLY = [
    "opt",
    "gptj",
    "gpt_neo",
    "bart",
    "llama",
    "llama4",
    "mistral",
    "mixtral",
    "phi",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
]
BEFT_TARGETS = changed(
    {},
    t5=("v",),
    mt5=("v",),
    roberta=("value",),
    bert=("value",),
    deberta_v2=("value_proj",),
    **dict.fromkeys(VALUE_ONLY, ("v_proj",)),
)
LLAMA_LIKE = ["llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi"]
OSF_TARGETS = changed(
    {},
    gpt2=("c_attn", "c_proj"),
    gpt_bigcode=("c_attn", "c_proj"),
    opt=OPT_LIKE,
    gptj=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value", "dense_4h_to_h")),
    **dict.fromkeys(LLAMA_LIKE, EVERY_PROJECTION),
)
# IA3: (targets, those of them whose input is scaled instead of their output)
_IA3 = {
    "t5": ("k v wo", "wo"),
    "mt5": ("k v wi_1", ""),
    "gpt2": ("c_attn mlp.c_proj", "mlp.c_proj"),
    "bloom": ("query_key_value mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "roberta": ("key value output.dense", "output.dense"),
    "opt": ("q_proj k_proj fc2", "fc2"),
    "gptj": ("q_proj v_proj fc_out", "fc_out"),
    "gpt_neox": ("query_key_value dense_4h_to_h", "dense_4h_to_h"),
    "gpt_neo": ("q_proj v_proj c_proj", "c_proj"),
    "bart": ("q_proj v_proj fc2", "fc2"),
    "gpt_bigcode": ("c_attn mlp.c_proj", "mlp.c_proj"),
    "llama": ("k_proj v_proj down_proj", "down_proj"),
    "llama4": ("q_proj v_proj down_proj", "down_proj"),
    "mistral": ("k_proj v_proj down_proj", "down_proj"),
    "mixtral": ("k_proj v_proj w2", "w2"),
    "bert": ("key value output.dense", "output.dense"),
    "deberta-v2": ("key_proj value_proj output.dense", "output.dense"),
    "deberta": ("in_proj output.dense", "output.dense"),
    "phi": ("q_proj v_proj fc2", "fc2"),
    **dict.fromkeys(("RefinedWebModel", "RefinedWeb", "falcon"), ("query_key_value dense_4h_to_h", "dense_4h_to_h")),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj v_proj down_proj", "down_proj")),
}
IA3_TARGETS = {model: both[0].split() for model, both in _IA3.items()}
IA3_FEEDFORWARD = {model: both[1].split() for model, both in _IA3.items()}
LN_TUNING_TARGETS = {
    model: names.split()
    for model, names in {
        "llama": "input_layernorm post_attention_layernorm norm",
        "bloom": "input_layernorm post_attention_layernorm ln_f",
        "llava": "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head",
        "t5": "layer_norm final_layer_norm",
        "mt5": "layer_norm final_layer_norm",
        "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
        "gpt2": "ln_1 ln_2 ln_f",
        "blip-2": "layernorm LayerNorm final_layer_norm self_attn_layer_norm",
        "gptj": "ln_1 ln_f",
        "falcon": "input_layernorm post_attention_layernorm ln_f",
        "mistral": "input_layernorm post_attention_layernorm norm",
        "phi": "input_layernorm final_layernorm",
        "gemma": "input_layernorm post_attention_layernorm norm",
        "gemma2": "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm",
        "gemma3_text": "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
        "post_feedforward_layernorm norm",
        "qwen2": "post_attention_layernorm",
        "qwen3": "post_attention_layernorm",
    }.items()
}

# Bottleneck adapters. attention, feed_forward: the linear layers whose outputs the residual connections add; block: the
# modules whose output is what the feed-forward's residual connection (and norm) made, with renorm the norm itself;
# beside: the feed-forward, for parallel adapters, with taps the linear layer at its end; {} is the layer's number.
_LLAMA_SITES = {
    "attention": r"layers\.{}\.self_attn\.o_proj",
    "feed_forward": r"layers\.{}\.mlp\.down_proj",
    "block": r"layers\.{}",
    "beside": r"layers\.{}\.mlp",
    "embedding": "embed_tokens",
}
_BERT_SITES = {
    "attention": r"layer\.{}\.attention\.output\.dense",
    "feed_forward": r"layer\.{}\.output\.dense",
    "block": r"layer\.{}\.output\.LayerNorm",
    "renorm": True,
    "beside": r"layer\.{}\.output\.dense",
    "taps": {"output.dense": "intermediate"},
    "embedding": "embeddings.LayerNorm",
}
_GPT2_SITES = {
    "attention": r"h\.{}\.attn\.c_proj",
    "feed_forward": r"h\.{}\.mlp\.c_proj",
    "block": r"h\.{}",
    "beside": r"h\.{}\.mlp",
    "embedding": "drop",
}
_T5_SITES = {
    "attention": r"block\.{}\.layer\.0\.SelfAttention\.o",
    "feed_forward": r"block\.{}\.layer\.[12]\.DenseReluDense\.wo",
    "block": r"(?:encoder\.block\.{}\.layer\.1|decoder\.block\.{}\.layer\.2)",
    "beside": r"block\.{}\.layer\.[12]\.DenseReluDense",
    "embedding": "encoder.embed_tokens",
}
_BART_SITES = {
    "attention": r"layers\.{}\.self_attn\.out_proj",
    "feed_forward": r"layers\.{}\.fc2",
    "block": r"layers\.{}\.final_layer_norm",
    "renorm": True,
    "beside": r"layers\.{}\.fc2",
    "taps": {"fc2": "fc1"},
    "embedding": None,
}
_NEOX_SITES = {
    **_LLAMA_SITES,
    "attention": r"layers\.{}\.attention\.dense",
    "feed_forward": r"layers\.{}\.mlp\.dense_4h_to_h",
    "embedding": "embed_in",
}
_BLOOM_SITES = {
    "attention": r"h\.{}\.self_attention\.dense",
    "feed_forward": r"h\.{}\.mlp\.dense_4h_to_h",
    "block": r"h\.{}",
    "beside": r"h\.{}\.mlp\.dense_4h_to_h",
    "taps": {"dense_4h_to_h": "dense_h_to_4h"},
    "embedding": "word_embeddings_layernorm",
}
BOTTLENECK_SITES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "stablelm", "phi3"), _LLAMA_SITES),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT_SITES),
    "gpt2": _GPT2_SITES,
    "gpt_bigcode": _GPT2_SITES,
    "gptj": {**_GPT2_SITES, "attention": r"h\.{}\.attn\.out_proj", "feed_forward": r"h\.{}\.mlp\.fc_out"},
    "gpt_neo": {**_GPT2_SITES, "attention": r"h\.{}\.attn\.attention\.out_proj"},
    "t5": _T5_SITES,
    "mt5": _T5_SITES,
    "bart": _BART_SITES,
    "opt": {**_BART_SITES, "block": r"layers\.{}", "renorm": False},
    "whisper": {**_BART_SITES, "block": r"layers\.{}", "renorm": False},
    "gpt_neox": _NEOX_SITES,
    "phi": {
        **_LLAMA_SITES,
        "attention": r"layers\.{}\.self_attn\.dense",
        "feed_forward": r"layers\.{}\.mlp\.fc2",
    },
    "vit": {
        **_LLAMA_SITES,
        "attention": r"layers\.{}\.attention\.o_proj",
        "feed_forward": r"layers\.{}\.mlp\.fc2",
        "embedding": "embeddings",
    },
    "bloom": _BLOOM_SITES,
    "falcon": {**_BLOOM_SITES, "embedding": "word_embeddings"},
    "distilbert": {
        "attention": r"layer\.{}\.attention\.out_lin",
        "feed_forward": r"layer\.{}\.ffn\.lin2",
        "block": r"layer\.{}\.output_layer_norm",
        "renorm": True,
        "beside": r"layer\.{}\.ffn",
        "embedding": "embeddings.LayerNorm",
    },
}

# What to do to a prefix's keys and values by model type. Empty since transformers' caches have one layout for all.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict = {}

# What models call the lists of their blocks.
BLOCK_LISTS = ("layers", "layer", "h", "block", "blocks")
