"""What training says."""

TABLE = {
    "train.data": {
        "en": "Data: {train} samples to train on, {held_out} held out",
        "zh": "数据：训练 {train} 条，留出 {held_out} 条",
    },
    "train.file": {"en": "  {path}: {format} ({mapping})", "zh": "  {path}：{format}（{mapping}）"},
    "train.dropped": {
        "en": "{path}: {count} of {total} rows dropped, because fields are empty or wrong",
        "zh": "{path}：{total} 行中有 {count} 行因字段为空或有误被丢弃",
    },
    "train.leaked": {
        "en": "{count} of {total} held-out samples are in the training data too: their score says little",
        "zh": "留出的 {total} 条中有 {count} 条也在训练数据里：其得分意义不大",
    },
    "train.model": {"en": "Base model: {base}, {dtype}, on {device}", "zh": "基座模型：{base}，{dtype}，设备 {device}"},
    "train.plan": {
        "en": "Training {trainable:,} of {total:,} parameters ({share:.2%}) for {steps} steps; Ctrl-C stops and saves",
        "zh": "训练 {total:,} 个参数中的 {trainable:,} 个（{share:.2%}），共 {steps} 步；按 Ctrl-C 可停止并保存",
    },
    "train.step": {
        "en": "step {step}/{total}  loss {loss:.4f}  lr {lr:.2e}  {speed:.0f} tokens/s  {memory:.0f} MB  {left} left",
        "zh": "第 {step}/{total} 步  损失 {loss:.4f}  学习率 {lr:.2e}  {speed:.0f} 词元/秒  {memory:.0f} MB  剩余 {left}",
    },
    "train.evaluated": {
        "en": "  held out, after step {step}: {measures}",
        "zh": "  留出集，第 {step} 步之后：{measures}",
    },
    "train.loftq": {
        "en": "LoRA starts from what quantizing took away, for {tokens} tokens of the training data ({seconds:.0f} s)",
        "zh": "LoRA 从量化所丢失的部分开始，依据训练数据的 {tokens} 个词元（{seconds:.0f} 秒）",
    },
    "train.resumed": {"en": "Resumed from the checkpoint of step {step}", "zh": "从第 {step} 步的检查点继续"},
    "train.damaged_checkpoint": {
        "en": "{path} is damaged ({problem}); an older checkpoint is taken",
        "zh": "{path} 已损坏（{problem}）；改用更早的检查点",
    },
    "train.not_saved": {
        "en": "{path} cannot be written: {problem}. Make room or choose another output.dir; older checkpoints are whole.",
        "zh": "无法写入 {path}：{problem}。请腾出空间或更换 output.dir；更早的检查点仍完整。",
    },
    "train.saved": {
        "en": "Saved the adapter of step {step} to {path} ({seconds:.0f} s)",
        "zh": "已将第 {step} 步的适配器保存到 {path}（{seconds:.0f} 秒）",
    },
    "train.interrupted": {
        "en": "stopped after step {step}, and saved; `peft train --resume {path}` goes on from there.",
        "zh": "在第 {step} 步后停止并已保存；运行 `peft train --resume {path}` 可从此处继续。",
    },
    "train.not_finite": {
        "en": "the loss of step {step} is not finite; the first module to compute such a number is {layer}. Lower "
        "train.lr, or use model.dtype=bf16 or fp32.",
        "zh": "第 {step} 步的损失不是有限数；最先算出这种数的模块是 {layer}。请降低 train.lr，或用 model.dtype=bf16 或 fp32。",
    },
    "train.zero_loss": {
        "en": "the loss of the first step is 0: nothing is learnt from this data.",
        "zh": "第一步的损失为 0：从这些数据中学不到任何东西。",
    },
    "train.gradient_not_finite": {
        "en": "the first gradient of {layer} is not finite ({count} tensors in all).",
        "zh": "{layer} 的首个梯度不是有限数（共 {count} 个张量）。",
    },
    "train.zero_gradient": {
        "en": "all gradients of the first step are 0, for example that of {layer}: nothing would be learnt.",
        "zh": "第一步的所有梯度都是 0，例如 {layer}：什么也学不到。",
    },
    "train.nothing_trained": {
        "en": "the adapter has no trained parameter; check adapter.target.",
        "zh": "适配器没有可训练的参数；请检查 adapter.target。",
    },
    "train.unreached": {
        "en": "{count} trained tensors had no part in the first step, {layer} for example",
        "zh": "有 {count} 个可训练张量没有参与第一步，例如 {layer}",
    },
    "train.data_changed": {
        "en": "{path} has changed since the run was started; start a new one.",
        "zh": "{path} 在运行开始后已被修改；请重新开始一次训练。",
    },
    "train.recipe_changed": {
        "en": "a resumed run keeps its recipe; {changes} cannot be changed. Start a new run.",
        "zh": "续训沿用原配方，不能更改 {changes}。请开始新的运行。",
    },
    "train.no_recipe": {
        "en": "give a recipe, `peft train recipe.yaml`, or a run to go on with, `peft train --resume RUN`.",
        "zh": "请给出配方：`peft train recipe.yaml`，或要继续的运行：`peft train --resume RUN`。",
    },
    "train.recipe_differs": {
        "en": "the unfinished run {path} has another recipe ({fields}). To go on with it as it was: `peft train --resume {path}`; "
        "to start anew, leave --resume out.",
        "zh": "未完成的运行 {path} 使用了不同的配方（{fields}）。按原配方继续：`peft train --resume {path}`；"
        "重新开始：去掉 --resume。",
    },
    "train.nothing_to_resume": {
        "en": "no interrupted run of this recipe in {path}; a new one begins",
        "zh": "{path} 中没有该配方的未完成运行；开始新的运行",
    },
    "train.already_done": {"en": "{path} is finished.", "zh": "{path} 已完成。"},
}
