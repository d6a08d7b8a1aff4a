"""What evaluation says, on the terminal and in its report."""

TABLE = {
    # -- while it works
    "evaluate.start": {
        "en": "Evaluating {count} samples ({source}): {sides}",
        "zh": "评测 {count} 条样本（{source}）：{sides}",
    },
    "evaluate.forgetting": {
        "en": "Perplexity of general text, for what was forgotten",
        "zh": "计算通用文本的困惑度，检查遗忘",
    },
    "evaluate.done": {"en": "Report: {path}", "zh": "报告：{path}"},
    # -- what can be wrong
    "evaluate.no_data": {
        "en": "there is nothing to evaluate on: no rows were held out; give data.test=FILE.",
        "zh": "没有可评测的数据：训练时没有留出数据；请给出 data.test=文件。",
    },
    "evaluate.no_metric": {
        "en": "`{name}` is not measured here; there is {known}. Did you mean `{nearest}`?",
        "zh": "这里没有指标 `{name}`；可用：{known}。是否应为 `{nearest}`？",
    },
    "evaluate.bad_limit": {
        "en": "--fail-under {given}: write measure=number, for example accuracy=0.8.",
        "zh": "--fail-under {given}：请写成 指标=数值，例如 accuracy=0.8。",
    },
    "evaluate.too_bad": {
        "en": "{name} is {value} {sign} {limit:g}.",
        "zh": "{name} 为 {value} {sign} {limit:g}，未达标。",
    },
    "evaluate.no_text": {"en": "eval.forgetting: there is no file {path}.", "zh": "eval.forgetting：没有文件 {path}。"},
    "evaluate.empty_text": {"en": "eval.forgetting: {path} is empty.", "zh": "eval.forgetting：{path} 是空的。"},
    "evaluate.one_run": {"en": "give one run.", "zh": "请给出一个运行。"},
    "evaluate.fixed": {
        "en": "`{key}` belongs to the training and cannot be changed here; what can: {allowed}.",
        "zh": "`{key}` 属于训练，不能在此更改；可更改的有：{allowed}。",
    },
    # -- what takes away from the figures
    "evaluate.not_blind": {
        "en": "Note: the best checkpoint was chosen on these held-out samples, so the figures are a little too good; "
        "data.test=FILE gives an unseen test.",
        "zh": "注意：最佳检查点就是用这些留出样本选出的，数字略偏乐观；用 data.test=文件 可得到未见过的测试。",
    },
    "evaluate.leaked": {
        "en": "Note: {count} of {total} samples are in the training data too, so their score says little",
        "zh": "注意：{total} 条样本中有 {count} 条也在训练数据里，其得分意义不大",
    },
    "evaluate.leak_unknown": {
        "en": "Note: the training data is not here, so whether samples are in it was not checked.",
        "zh": "注意：训练数据不在本机，未检查样本是否出现在其中。",
    },
    "evaluate.untrained_head": {
        "en": "Note: the base has no output layer for this task; what stands for it is the untrained layer that training "
        "began with, which guesses. The commonest label is the fairer yardstick.",
        "zh": "注意：基座没有该任务的输出层，这里用训练开始时未经训练的输出层代替，等于瞎猜；更公平的参照是最常见的标签。",
    },
    "evaluate.no_base": {
        "en": "Note: every weight was trained (adapter.method=full) together with a new output layer, so there is no base "
        "to compare with.",
        "zh": "注意：全部权重与新的输出层一起训练（adapter.method=full），没有可比较的基座。",
    },
    # -- the report
    "evaluate.title": {"en": "Evaluation of {name}", "zh": "评测：{name}"},
    "evaluate.judged": {"en": "{count} samples, {source}.", "zh": "共 {count} 条样本，{source}。"},
    "evaluate.from_test": {"en": "from data.test", "zh": "来自 data.test"},
    "evaluate.from_held_out": {"en": "held out from the training data", "zh": "从训练数据中留出"},
    "evaluate.base_adapter_off": {
        "en": "Base: the same model with its adapter switched off, in the same pass.",
        "zh": "基座：同一模型关闭适配器，在同一遍中计算。",
    },
    "evaluate.base_untrained_head": {
        "en": "Base: the same model with its adapter switched off, and an untrained output layer.",
        "zh": "基座：同一模型关闭适配器，输出层未经训练。",
    },
    "evaluate.base_separate": {
        "en": "Base: the base model, loaded beside the tuned one.",
        "zh": "基座：单独加载的基座模型。",
    },
    "evaluate.measures": {"en": "Measures", "zh": "指标"},
    "evaluate.how_sure": {
        "en": "In brackets: 95% intervals, by 2000 bootstrap resamples. p: how often chance alone gives a difference this "
        "large, by 2000 random exchanges of base and tuned answers; below 0.05 a difference counts.",
        "zh": "方括号内为 95% 区间（2000 次自助重采样）。p：仅凭偶然出现这么大差异的概率（2000 次随机交换基座与微调后的回答）；"
        "小于 0.05 才算有差异。",
    },
    "evaluate.measure": {"en": "measure", "zh": "指标"},
    "evaluate.base": {"en": "base", "zh": "基座"},
    "evaluate.tuned": {"en": "tuned", "zh": "微调后"},
    "evaluate.difference": {"en": "difference", "zh": "差"},
    "evaluate.p": {"en": "p", "zh": "p"},
    "evaluate.verdict": {"en": "verdict", "zh": "结论"},
    "evaluate.better": {"en": "better", "zh": "更好"},
    "evaluate.worse": {"en": "worse", "zh": "更差"},
    "evaluate.unclear": {"en": "unclear", "zh": "不明显"},
    "evaluate.forgetting_title": {"en": "Forgetting: perplexity of general text", "zh": "遗忘：通用文本的困惑度"},
    "evaluate.forgetting_means": {
        "en": "Tuned over base: above 1, general text has become more surprising. A task-shaped model often is a little "
        "above; several times the base means that much was overwritten.",
        "zh": "微调后与基座之比：大于 1 表示通用文本变得更难预测。略高于 1 很常见；达到数倍则说明原有能力被大量覆盖。",
    },
    "evaluate.text": {"en": "text", "zh": "文本"},
    "evaluate.ratio": {"en": "tuned / base", "zh": "微调后/基座"},
    "evaluate.labels": {"en": "Labels", "zh": "各标签"},
    "evaluate.commonest": {
        "en": "Always answering `{label}` would reach an accuracy of {share:.4f}.",
        "zh": "一律回答“{label}”的准确率为 {share:.4f}。",
    },
    "evaluate.label": {"en": "label", "zh": "标签"},
    "evaluate.support": {"en": "samples", "zh": "数量"},
    "evaluate.f1_base": {"en": "F1, base", "zh": "F1（基座）"},
    "evaluate.f1_tuned": {"en": "F1, tuned", "zh": "F1（微调后）"},
    "evaluate.confusion": {"en": "{side}: true ↓ given →", "zh": "{side}：真实 ↓ 回答 →"},
    "evaluate.other": {"en": "(other)", "zh": "（其他）"},
    "evaluate.best": {"en": "Best samples", "zh": "最好的样本"},
    "evaluate.worst": {"en": "Worst samples", "zh": "最差的样本"},
    "evaluate.changed": {"en": "Most changed samples", "zh": "变化最大的样本"},
    "evaluate.prompt": {"en": "prompt", "zh": "提示"},
    "evaluate.reference": {"en": "reference", "zh": "参考"},
}
