"""What is said about base models."""

TABLE = {
    "base.none": {
        "en": "the recipe names no model; set model.path to a folder or a hub id.",
        "zh": "配方中没有模型；请把 model.path 设为文件夹或 hub 名称。",
    },
    "base.no_model": {
        "en": "{path} holds no model: there is no config.json.",
        "zh": "{path} 中没有模型：缺少 config.json。",
    },
    "base.not_found": {
        "en": "there is no model {path}: no such folder, none below $PEFT_ASSETS, and it is no hub id.",
        "zh": "找不到模型 {path}：没有该文件夹，$PEFT_ASSETS 下也没有，且不是 hub 名称。",
    },
    "base.not_here": {
        "en": "the model {path} is not on this machine, and could not be fetched. Where there is a network: "
        "`hf download {path}`; or set model.path to a folder.",
        "zh": "本机没有模型 {path}，也无法下载。有网络时请运行 `hf download {path}`，或把 model.path 设为本地文件夹。",
    },
    "base.broken": {"en": "the model {path} cannot be loaded: {problem}", "zh": "无法加载模型 {path}：{problem}"},
    "base.missing": {
        "en": "{path} lacks weights that {model} needs ({key}), which would be random: take another model or task.",
        "zh": "{path} 缺少 {model} 所需的权重（{key}），它们会是随机值：请换模型或任务。",
    },
    "base.slow_tokenizer": {
        "en": "{path} has no tokenizer.json; it is needed to tell which tokens an answer has.",
        "zh": "{path} 没有 tokenizer.json；需要它来确定回答对应哪些词元。",
    },
    "base.no_end_token": {
        "en": "the tokenizer of {path} has neither a padding nor an end token.",
        "zh": "{path} 的分词器既没有填充符也没有结束符。",
    },
    "base.no_device": {"en": "there is no device `{device}` here.", "zh": "本机没有设备 `{device}`。"},
    "base.fp16_on_cpu": {
        "en": "model.dtype=fp16 is for GPUs; on a CPU use auto, bf16 or fp32.",
        "zh": "model.dtype=fp16 只用于 GPU；CPU 上请用 auto、bf16 或 fp32。",
    },
    "base.unknown_dtype": {"en": "`{dtype}` is no number format.", "zh": "`{dtype}` 不是数值格式。"},
}
