"""What is said about memory before a training."""

TABLE = {
    "plan.no_size": {
        "en": "`{text}` is no size of memory; write a number and a unit, for example 7GiB or 500MB.",
        "zh": "`{text}` 不是内存大小；请写数字加单位，例如 7GiB 或 500MB。",
    },
    "plan.trains": {
        "en": "Trained: {trained:,} of {total:,} numbers ({share:.3%})",
        "zh": "训练：{total:,} 个参数中的 {trained:,} 个（{share:.3%}）",
    },
    "plan.kind": {"en": "kind", "zh": "类别"},
    "plan.where": {"en": "where", "zh": "位置"},
    "plan.tensors": {"en": "tensors", "zh": "张量数"},
    "plan.numbers": {"en": "numbers", "zh": "参数量"},
    "plan.method": {"en": "adapter", "zh": "适配器"},
    "plan.head": {"en": "whole module", "zh": "整个模块"},
    "plan.token_rows": {"en": "token rows", "zh": "词元行"},
    "plan.base": {"en": "base weights", "zh": "基座权重"},
    "plan.memory": {
        "en": "Memory of a step with {batch} samples of {length} tokens (* is this recipe)",
        "zh": "每步 {batch} 条、每条 {length} 个词元时的内存（* 为本配方）",
    },
    "plan.weights": {"en": "weights", "zh": "权重"},
    "plan.gradients": {"en": "gradients", "zh": "梯度"},
    "plan.optimizer": {"en": "optimizer", "zh": "优化器"},
    "plan.activations": {"en": "activations", "zh": "激活值"},
    "plan.logits": {"en": "output and loss", "zh": "输出与损失"},
    "plan.evaluation": {"en": "evaluation", "zh": "评估"},
    "plan.peak": {"en": "peak", "zh": "峰值"},
    "plan.largest": {
        "en": "With {room}: a batch of up to {batch} at this length, or a length of up to {length} at this batch",
        "zh": "可用 {room}：此长度下批大小最多 {batch}；此批大小下长度最多 {length}",
    },
    "plan.probe": {
        "en": "Measured: {step_seconds} s a step, peak {peak} (planned {planned})",
        "zh": "实测：每步 {step_seconds} 秒，峰值 {peak}（估算 {planned}）",
    },
    "plan.time": {
        "en": "All {steps} steps take about {minutes:.1f} minutes, evaluations not counted",
        "zh": "全部 {steps} 步约需 {minutes:.1f} 分钟（不含评估）",
    },
    "plan.fits": {"en": "It fits: {peak} of {room}", "zh": "可以运行：需要 {peak}，可用 {room}"},
    "plan.tight": {
        "en": "It fits, but it is tight: {peak} of {room}, and a plan may be off by 15 %",
        "zh": "勉强可以运行：需要 {peak}，可用 {room}；估算可能有 15% 的误差",
    },
    "plan.refused": {
        "en": "it does not fit: the peak would be {peak}, and there is room for {room}. {hint} `peft train --force` "
        "tries all the same.",
        "zh": "内存不足：峰值约为 {peak}，可用 {room}。{hint}可用 `peft train --force` 强行尝试。",
    },
    "plan.remedies": {"en": "What would fit: {changes}.", "zh": "可行的修改：{changes}。"},
    "plan.no_remedy": {
        "en": "Nothing that was tried would fit: take a smaller model, or a shorter data.max_length.",
        "zh": "尝试过的修改都不可行：请换更小的模型，或减小 data.max_length。",
    },
    "plan.failed": {
        "en": "Memory could not be planned for this model ({problem}); training goes on without",
        "zh": "无法为该模型估算内存（{problem}）；继续训练",
    },
    "plan.ahead": {
        "en": "Memory: a peak of about {peak}, with {room} at hand",
        "zh": "内存：峰值约 {peak}，可用 {room}",
    },
    "plan.probe_needs_data": {
        "en": "--probe trains two steps, so the recipe needs data.train.",
        "zh": "--probe 会真实训练两步，因此配方需要 data.train。",
    },
}
