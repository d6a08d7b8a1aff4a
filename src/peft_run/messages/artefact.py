"""What is said about finished runs."""

TABLE = {
    "artefact.unfinished": {
        "en": "{path} holds no finished model; `peft train --resume {path}` goes on with it.",
        "zh": "{path} 中没有训练完成的模型；运行 `peft train --resume {path}` 可继续。",
    },
    "artefact.template_changed": {
        "en": "the chat template in {path} is not the one that the adapter was trained with.",
        "zh": "{path} 中的对话模板与训练时使用的不同。",
    },
    "artefact.tokenizer_changed": {
        "en": "the tokenizer in {path} is not the one that the adapter was trained with.",
        "zh": "{path} 中的分词器与训练时使用的不同。",
    },
}
