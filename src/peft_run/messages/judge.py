"""What is said about samples that are judged."""

TABLE = {
    "judge.dropped": {
        "en": "{count} of {total} samples are longer than {limit} tokens and have no loss, as in training",
        "zh": "{total} 条样本中有 {count} 条超过 {limit} 个词元，与训练时一样不计损失",
    },
    "judge.cut": {
        "en": "{count} of {total} prompts are longer than the {limit} tokens that leave room for an answer; their "
        "beginning is cut",
        "zh": "{total} 条提示中有 {count} 条超过可用的 {limit} 个词元（需为回答留出空间）；已截去开头",
    },
    "judge.no_words": {
        "en": "Chinese is counted in characters only: splitting it into words needs `pip install 'peft[zh]'`",
        "zh": "中文仅按字计算：按词计算需要 `pip install 'peft[zh]'`",
    },
}
