"""What a comparison of runs says."""

TABLE = {
    "compare.title": {"en": "Comparison: {names}", "zh": "对比：{names}"},
    "compare.nothing": {
        "en": "none of these runs is finished: there is nothing to compare.",
        "zh": "这些运行都未完成，没有可比较的内容。",
    },
    "compare.two": {"en": "give two runs or more.", "zh": "请给出两个或更多运行。"},
    "compare.not_evaluated": {
        "en": "{run} has not been evaluated; `peft evaluate` does it.",
        "zh": "{run} 尚未评测；请运行 `peft evaluate`。",
    },
    "compare.damaged": {
        "en": "{path} is damaged or gone ({problem}); `peft evaluate {run}` writes it again.",
        "zh": "{path} 已损坏或丢失（{problem}）；运行 `peft evaluate {run}` 可重新生成。",
    },
    "compare.against": {"en": "against {run}", "zh": "与 {run} 相比"},
    "compare.training": {"en": "Training", "zh": "训练"},
    "compare.recipes": {"en": "What the recipes differ in", "zh": "配方的不同之处"},
    "compare.same_recipe": {"en": "Nothing.", "zh": "完全相同。"},
    "compare.field": {"en": "field", "zh": "字段"},
    "compare.step": {"en": "step", "zh": "步"},
    "compare.spread": {"en": "Where the runs differ most", "zh": "各运行差异最大的样本"},
    "compare.curve_loss": {"en": "training loss, smoothed", "zh": "训练损失（平滑）"},
    "compare.curve_eval_loss": {"en": "held-out loss", "zh": "留出集损失"},
    "compare.curve_lr": {"en": "learning rate", "zh": "学习率"},
    "compare.loss_last": {"en": "training loss at the end", "zh": "最终训练损失"},
    "compare.eval_loss": {"en": "held-out loss", "zh": "留出集损失"},
    "compare.steps": {"en": "steps", "zh": "步数"},
    "compare.tokens": {"en": "tokens", "zh": "词元数"},
    "compare.tokens_per_second": {"en": "tokens per second", "zh": "每秒词元数"},
    "compare.peak_memory_mb": {"en": "peak memory (MB)", "zh": "内存峰值（MB）"},
    "compare.trainable": {"en": "trained parameters", "zh": "可训练参数"},
    "compare.seconds": {"en": "seconds", "zh": "用时（秒）"},
    "compare.file_mb": {"en": "size of the result (MB)", "zh": "结果大小（MB）"},
    "compare.written": {"en": "Page: {path}", "zh": "页面：{path}"},
}
