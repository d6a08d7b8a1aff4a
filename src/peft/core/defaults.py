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

# What to do to a prefix's keys and values by model type. Empty since transformers' caches have one layout for all.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict = {}
