"""What is said while an adapter is held against full fine-tuning."""

TABLE = {
    "full.begin": {
        "en": "Full fine-tuning for comparison: the same {steps} steps with every weight trained, learning rate {lr:g}",
        "zh": "用于对比的全量微调：同样 {steps} 步，训练全部权重，学习率 {lr:g}",
    },
    "full.found": {
        "en": "Full fine-tuning for comparison: {path} is that already",
        "zh": "用于对比的全量微调：已有 {path}",
    },
    "full.already": {
        "en": "this run trained every weight itself; --against-full is for adapters.",
        "zh": "该运行本身就是全量微调；--against-full 用于适配器。",
    },
}
