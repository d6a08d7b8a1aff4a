"""What `peft data` says."""

TABLE = {
    "stats.task": {"en": "task: {task}", "zh": "任务：{task}"},
    "stats.file": {
        "en": "{part}: {path}: {rows} rows, {columns} columns, {encoding}; format {format} ({mapping})",
        "zh": "{part}：{path}：{rows} 行，{columns} 列，{encoding}；格式 {format}（{mapping}）",
    },
    "stats.dropped": {"en": "  {count} rows cannot be used", "zh": "  {count} 行无法使用"},
    "stats.samples": {
        "en": "samples: {train} to train on, {eval} held out",
        "zh": "样本：训练 {train} 条，留出 {eval} 条",
    },
    "stats.labels": {"en": "labels, {part}:", "zh": "标签，{part}："},
    "stats.characters": {"en": "characters per sample, {part}: {spread}", "zh": "每条样本的字符数，{part}：{spread}"},
    "stats.tokens": {"en": "tokens per sample, {part}: {spread}", "zh": "每条样本的词元数，{part}：{spread}"},
    "stats.duplicates": {"en": "repeated rows: {count}", "zh": "重复的行：{count}"},
    "stats.leaked": {
        "en": "held-out rows that are in the training data too: {count}",
        "zh": "同时出现在训练数据中的留出行：{count}",
    },
    "stats.preview": {
        "en": "first samples as the model reads them; what is learnt is green, or between ⟦ ⟧:",
        "zh": "模型读到的前几条样本；学习的部分为绿色，或在 ⟦ ⟧ 之间：",
    },
    "stats.no_model": {
        "en": "With --model PATH, tokens are counted and samples shown as the model reads them.",
        "zh": "加上 --model PATH 可统计词元，并按模型读到的样子显示样本。",
    },
}
