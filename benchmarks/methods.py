"""The settings in which every method is measured: the same small model, ranks that are usual for the method."""

from __future__ import annotations

PROJECTIONS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]

# method: (config class, its arguments beside the targets, arguments of each forward)
METHODS: dict[str, tuple[str, dict, dict]] = {
    "LORA": ("LoraConfig", {"r": 16, "lora_alpha": 32}, {}),
    "ADALORA": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000}, {}),
    "ADAMSS": ("AdamssConfig", {"r": 64, "num_subspaces": 5, "subspace_rank": 2}, {}),
    "ADAPTION_PROMPT": (
        "AdaptionPromptConfig",
        {"target_modules": "self_attn", "adapter_len": 10, "adapter_layers": 2},
        {},
    ),
    "BEFT": ("BeftConfig", {}, {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 1}, {}),
    "C3A": ("C3AConfig", {"block_size": 64}, {}),
    "DEFT": ("DeftConfig", {"r": 16}, {}),
    "DELORA": ("DeloraConfig", {"r": 16}, {}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 1000}, {}),
    "FROD": ("FrodConfig", {}, {}),
    "GLORA": ("GloraConfig", {"r": 8}, {}),
    "GRALORA": ("GraloraConfig", {"r": 16, "alpha": 32}, {}),
    "HIRA": ("HiraConfig", {"r": 16}, {}),
    "HRA": ("HRAConfig", {"r": 8}, {}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, {}),
    "LILY": ("LilyConfig", {"r": 16, "num_B": 2}, {}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}, {}),
    "LOHA": ("LoHaConfig", {"r": 16}, {}),
    "LOKR": ("LoKrConfig", {"r": 16}, {}),
    "MISS": ("MissConfig", {"r": 64}, {}),
    "OFT": ("OFTConfig", {"oft_block_size": 32}, {}),
    "OSF": ("OSFConfig", {"effective_rank": 32}, {}),
    "PEANUT": ("PeanutConfig", {"r": 16, "depth": 0}, {}),
    "POLY": ("PolyConfig", {"r": 8, "n_tasks": 2, "n_skills": 4}, {"task_ids": [0]}),
    "PSOFT": ("PsoftConfig", {"r": 32}, {}),
    "PVERA": ("PveraConfig", {"r": 64}, {}),
    "RANDLORA": ("RandLoraConfig", {"r": 32}, {}),
    "REFT": ("ReftConfig", {"r": 4, "target_modules": None}, {}),
    "ROAD": ("RoadConfig", {"variant": "road_1"}, {}),
    "SHADOW": ("ShadowConfig", {"target_modules": None}, {}),
    "SHIRA": ("ShiraConfig", {"r": 16}, {}),
    "SUPERTUNING": ("SupertuningConfig", {}, {}),
    "TINYLORA": ("TinyLoraConfig", {"r": 2}, {}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [1, 2, 3]}, {}),
    "UNILORA": ("UniLoraConfig", {"r": 8}, {}),
    "VBLORA": ("VBLoRAConfig", {"r": 4, "num_vectors": 64, "vector_length": 64}, {}),
    "VERA": ("VeraConfig", {"r": 64}, {}),
    "WAVEFT": ("WaveFTConfig", {}, {}),
}
# The same for prompt methods, which have no targets.
PROMPTS: dict[str, tuple[str, dict, dict]] = {
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 16}, {}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 16, "encoder_hidden_size": 128}, {}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 16}, {}),
    "PREFIX_TUNING, projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 16, "prefix_projection": True, "encoder_hidden_size": 128},
        {},
    ),
    "MULTITASK_PROMPT_TUNING": (
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 16, "num_tasks": 2},
        {"task_ids": [0]},
    ),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 16}, {}),
}
# What is to be at least this many times faster than upstream; every other method at least 1 / 1.05.
FASTER = dict.fromkeys(["BOFT", "FOURIERFT", "ADAMSS", "OSF", "FROD", "LOHA", "LOKR", "OFT", "WAVEFT"], 2.0)


def config(method: str):
    """The config of a method for the models that are measured."""
    import peft

    name, arguments, _ = (METHODS | PROMPTS)[method]
    targets = {"target_modules": PROJECTIONS} if method in METHODS else {}
    return getattr(peft, name)(**{**targets, "task_type": "CAUSAL_LM", **arguments})


def call(method: str) -> dict:
    """Further arguments of each forward."""
    import torch

    return {name: torch.tensor(value) for name, value in (METHODS | PROMPTS)[method][2].items()}
