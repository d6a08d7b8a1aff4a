"""Upstream's module paths of the weight methods: `peft.tuners.<method>` with .config, .layer and .model. Data only."""

# method: (how its class names begin, "legacy layer class=kind ..."), see by_kind for the kinds
METHODS = {
    "adalora": ("AdaLora", "SVDLinear=linear SVDConv2d=conv2"),
    "adamss": ("Adamss", "Linear=linear"),
    "beft": ("Beft", "Linear=linear"),
    "boft": ("BOFT", "Linear=linear Conv2d=conv2"),
    "c3a": ("C3A", "C3ALinear=linear"),
    "deft": ("Deft", "DeftLinear=linear"),
    "delora": ("Delora", "DeloraLinear=linear"),
    "fourierft": ("FourierFT", "FourierFTLinear=linear"),
    "frod": ("Frod", "Linear=linear"),
    "glora": ("Glora", "GloraLinear=linear"),
    "gralora": ("Gralora", "Linear=linear"),
    "hira": ("Hira", "Linear=linear Embedding=embedding Conv1d=conv1 Conv2d=conv2 Conv3d=conv3 _ConvNd=conv"),
    "hra": ("HRA", "HRALinear=linear HRAConv2d=conv2"),
    "ia3": ("IA3", "Linear=linear Conv2d=conv2 Conv3d=conv3 _ConvNd=conv"),
    "lily": ("Lily", "Linear=linear"),
    "ln_tuning": ("LNTuning", ""),
    "loha": ("LoHa", "Linear=linear Conv1d=conv1 Conv2d=conv2"),
    "lokr": ("LoKr", "Linear=linear Conv1d=conv1 Conv2d=conv2"),
    "miss": ("Miss", "MissLinear=linear"),
    "oft": ("OFT", "Linear=linear Conv2d=conv2 Embedding=embedding"),
    "osf": ("OSF", "Linear=linear"),
    "peanut": ("Peanut", "Linear=linear"),
    "poly": ("Poly", "Linear=linear"),
    "psoft": ("Psoft", "Linear=linear"),
    "pvera": ("Pvera", "Linear=linear"),
    "randlora": ("RandLora", "Linear=linear"),
    "road": ("Road", "Linear=linear"),
    "shira": ("Shira", "Linear=linear"),
    "supertuning": ("Supertuning", "Linear=linear"),
    "tinylora": ("TinyLora", "Linear=linear Embedding=embedding"),
    "trainable_tokens": ("TrainableTokens", ""),
    "unilora": ("UniLora", "Linear=linear"),
    "vblora": ("VBLoRA", "Linear=linear"),
    "vera": ("Vera", "Linear=linear"),
    "waveft": ("WaveFT", "WaveFTLinear=linear"),
}
PROMPTS = {  # upstream's package: (file here, config names, encoder names)
    "prompt_tuning": ("prompt_tuning", "PromptTuningConfig PromptTuningInit", "PromptEmbedding"),
    "p_tuning": ("p_tuning", "PromptEncoderConfig PromptEncoderReparameterizationType", "PromptEncoder"),
    "prefix_tuning": ("prefix", "PrefixTuningConfig", "PrefixEncoder"),
    "multitask_prompt_tuning": (
        "multitask",
        "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
        "MultitaskPromptEmbedding",
    ),
    "cpt": ("cpt", "CPTConfig", "CPTEmbedding"),
    "cartridge": ("cartridge", "CartridgeConfig", "CartridgeEncoder"),
}
CARTRIDGE_TOOLS = (
    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values"
)
PARTS = {  # further names: upstream's module -> (home, names)
    "adamss.asa_callback": ("methods.adamss_callback", "AdamssAsaCallback"),
    "lokr.layer": ("methods.lokr", "factorization"),
    "poly.router": ("methods.poly", "PolyRouter"),
    "shadow.layers": ("methods.shadow.detached", "DetachedShadowModel"),
    "shira.mask_functions": ("methods.shira", "random_mask"),
    "xlora.classifier": ("methods.xlora.classifier", "XLoraClassifier"),
    "xlora.layer": ("methods.xlora.layer", "XLoraLayer"),
}
MODEL_LEVEL = {
    "adaption_prompt": "AdaptionPrompt",
    "shadow": "Shadow",
    "xlora": "XLora",
}  # without a layer of their own


# Upstream's tables of default targets that are not LoRA's; LN tuning's and VB-LoRA's names are spelled as there.
OWN_TARGETS = {
    "LNTUNING": "LN_TUNING",
    **{
        name: name
        for name in [
            "ADALORA",
            "ADAMSS",
            "BEFT",
            "C3A",
            "FOURIERFT",
            "FROD",
            "IA3",
            "OSF",
            "PVERA",
            "SHIRA",
            "VBLORA",
            "VERA",
            "WAVEFT",
        ]
    },
}
LIKE_LORA = [
    "BOFT",
    "DEFT",
    "DELORA",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "LILY",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "PEANUT",
    "POLY",
    "PSOFT",
    "RANDLORA",
    "ROAD",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
]


def target_tables():
    """{home: names} of the tables of default targets."""
    name = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING={}_TARGETS"
    names = [name.format(m, "LORA") for m in LIKE_LORA] + [name.format(m, own) for m, own in OWN_TARGETS.items()]
    names.append("TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING=IA3_FEEDFORWARD")
    return {"core.defaults": " ".join(names)}


def aliases():
    """{legacy module: {home: its names}} of all methods here."""
    found = {}
    for method, (stem, kinds) in METHODS.items():
        home, path = f"methods.{method}", f"tuners.{method}"
        layers = {home: f"{stem}Layer"}
        if kinds:
            layers["by_kind"] = " ".join(
                f"{name}={method}.{kind}" for name, kind in (k.split("=") for k in kinds.split())
            )
        found[path] = {**layers, home: f"{stem}Config {stem}Model {stem}Layer"}
        found[f"{path}.config"] = {home: f"{stem}Config"}
        found[f"{path}.layer"] = layers
        found[f"{path}.model"] = {home: f"{stem}Model"}
    for method, stem in MODEL_LEVEL.items():
        home, path = f"methods.{method}", f"tuners.{method}"
        found[path] = {home: f"{stem}Config {stem}Model"}
        found[f"{path}.config"] = {home: f"{stem}Config"}
        found[f"{path}.model"] = {home: f"{stem}Model"}
    for package, (file, configs, encoders) in PROMPTS.items():
        home, path = f"prompts.{file}", f"tuners.{package}"
        found[path] = {home: f"{configs} {encoders}"}
        found[f"{path}.config"] = {home: configs}
        found[f"{path}.model"] = {home: encoders}
    found["tuners.cartridge.utils"] = {"prompts.cartridge": CARTRIDGE_TOOLS}
    for path, (home, name) in PARTS.items():
        found.setdefault(f"tuners.{path}", {})[home] = " ".join(
            [*found.get(f"tuners.{path}", {}).get(home, "").split(), *name.split()]
        )
    return found


def public():
    """{home: names} of what `peft.tuners` itself exports."""
    stems = {**{method: stem for method, (stem, _) in METHODS.items()}, **MODEL_LEVEL}
    names = {f"methods.{method}": f"{stem}Config {stem}Model" for method, stem in stems.items()}
    return names | {f"prompts.{file}": f"{configs} {encoders}" for file, configs, encoders in PROMPTS.values()}
