"""The words of plots and reports."""

TABLE = {
    "report.step": {"en": "step", "zh": "步"},
    "report.raw": {"en": "each step", "zh": "每步"},
    "report.smooth": {"en": "smoothed", "zh": "平滑"},
    "report.held_out": {"en": "held out", "zh": "留出集"},
    "report.loss": {"en": "Loss", "zh": "损失"},
    "report.measures": {"en": "Held-out measures", "zh": "留出集指标"},
    "report.lr": {"en": "Learning rate", "zh": "学习率"},
    "report.speed": {"en": "Tokens per second", "zh": "每秒词元数"},
    "report.memory": {"en": "Peak memory, MB", "zh": "内存峰值（MB）"},
    "report.result": {"en": "Results", "zh": "结果"},
    "report.curves": {"en": "Curves", "zh": "曲线"},
    "report.data": {"en": "Data", "zh": "数据"},
    "report.recipe": {"en": "Recipe", "zh": "配方"},
    "report.environment": {"en": "Environment", "zh": "环境"},
    "report.part": {"en": "part", "zh": "部分"},
    "report.file": {"en": "file", "zh": "文件"},
    "report.format": {"en": "format", "zh": "格式"},
    "report.rows": {"en": "rows", "zh": "行数"},
    "report.sha256": {"en": "sha256", "zh": "sha256"},
    "report.written": {"en": "Wrote {path}", "zh": "已写入 {path}"},
}
