"""What every field of a recipe means, in both languages: the source of `config explain`, the schema and the web page."""

HELP: dict[str, tuple[str, str]] = {
    "version": ("version of the recipe format", "配方格式的版本"),
    "task": (
        "what is learnt: causal_lm (chat, instructions, plain text), seq_cls (a label per text), token_cls (a tag per "
        "token), qa (a span of the text), seq2seq, dpo/orpo/kto (preferences)",
        "学习什么：causal_lm（对话、指令、纯文本），seq_cls（每段文本一个标签），token_cls（每个词一个标签），"
        "qa（原文中的答案片段），seq2seq，dpo/orpo/kto（偏好）",
    ),
    "model": ("the base model", "基座模型"),
    "model.path": (
        "a folder, a folder below $PEFT_ASSETS, or a hub id",
        "本地文件夹、$PEFT_ASSETS 下的文件夹，或 hub 上的名称",
    ),
    "model.revision": ("commit or branch of a hub model", "hub 模型的提交或分支"),
    "model.tokenizer": ("tokenizer, if it is not the model's own", "分词器（若不是模型自带的）"),
    "model.dtype": (
        "number format of the frozen base; auto: bf16 where it is fast, else fp16 on a GPU and fp32 on a CPU. What is "
        "trained is always fp32",
        "冻结基座的数值格式；auto：bf16 够快时用 bf16，否则 GPU 用 fp16、CPU 用 fp32。被训练的参数始终是 fp32",
    ),
    "model.quant": ("load the base quantized (needs bitsandbytes)", "以量化方式加载基座（需要 bitsandbytes）"),
    "model.quant.bits": ("bits per weight", "每个权重的位数"),
    "model.quant.backend": ("library that quantizes", "量化所用的库"),
    "model.quant.type": ("4-bit number format", "4 位数值格式"),
    "model.quant.double": ("quantize the scales too", "对缩放系数再次量化"),
    "model.quant.loftq": (
        "start LoRA from what quantizing took away (LoftQ), as far as the training data feel it; the adapter then "
        "belongs to the quantized base alone",
        "让 LoRA 从量化所丢失的部分开始（LoftQ），以训练数据能感受到的为准；这样的适配器只适用于量化后的基座",
    ),
    "model.attn": ("attention implementation", "注意力的实现方式"),
    "model.device": ("auto, cpu, cuda, cuda:1, mps", "auto、cpu、cuda、cuda:1、mps"),
    "model.trust_remote_code": (
        "run Python files that come with the model: only for publishers you trust",
        "执行模型附带的 Python 文件：仅限可信的发布者",
    ),
    "data": ("what to learn from", "训练数据"),
    "data.train": ("files or folders to train on", "训练用的文件或文件夹"),
    "data.eval": (
        "held-out data: a file, or a share of the training data",
        "留出数据：一个文件，或训练数据的一部分",
    ),
    "data.test": (
        "files for the final evaluation; never read in training",
        "最终评测用的文件；训练时不会读取",
    ),
    "data.eval.split": (
        "share of the training rows that is held out, where no file is given; equal rows stay together",
        "未给文件时，从训练数据中留出的比例；相同的行不会分到两边",
    ),
    "data.template": (
        "chat template: auto (the tokenizer's, else plain), tokenizer, plain, or a .jinja file",
        "对话模板：auto（用分词器自带的，没有则用 plain）、tokenizer、plain，或 .jinja 文件",
    ),
    "data.system": ("system message put before every chat that has none", "加在没有系统消息的对话前的系统消息"),
    "data.prompt": (
        "the user's message, made of columns: `评论：{text}`; for generative classification and the like",
        "由各列拼成的用户消息，例如 `评论：{text}`；用于生成式分类等",
    ),
    "data.labels": (
        "the labels: a list in order, or {value in the file: name}; default: those found, sorted",
        "标签：按顺序的列表，或 {文件中的值: 名称}；默认取数据中出现的并排序",
    ),
    "data.max_length": ("tokens per sample, at most", "每条样本的最大词元数"),
    "data.overlong": (
        "what happens to longer samples; auto: chats are dropped (cut ones never learn to stop), texts are split, "
        "inputs of classifiers are cut",
        "超长样本的处理；auto：丢弃对话（截断后学不会停止），切分纯文本，截断分类输入",
    ),
    "data.train_on": (
        "which tokens of a chat are learnt: all answers, the last one, or everything",
        "学习对话中的哪些词元：所有回答、最后一个回答、或全部",
    ),
    "data.packing": (
        "put the samples of a batch into one row without padding; attention stays inside each sample",
        "把一批样本无填充地拼成一行；注意力不跨样本",
    ),
    "data.invalid": ("what happens to rows with empty or missing fields", "如何处理字段为空或缺失的行"),
    "data.deduplicate": ("train on equal rows once", "相同的行只训练一次"),
    "data.fraction": (
        "share of the training rows that is used, the labels in proportion; a larger share holds the smaller ones",
        "训练数据的使用比例，各标签按比例抽取；较大的比例包含较小的",
    ),
    "data.seed": ("of the split, `fraction` and `sample`", "划分、fraction 与抽样的随机种子"),
    "adapter": ("what is trained", "训练哪些参数"),
    "adapter.method": (
        "a method of `peft methods`, or full: every weight",
        "`peft methods` 中的方法，或 full：全部权重",
    ),
    "adapter.r": (
        "rank: size of the update; memory and capacity grow with it. LoRA: 16",
        "秩：更新量的大小，内存与容量随之增长。LoRA 默认 16",
    ),
    "adapter.alpha": ("scale of the update, in relation to r. LoRA: 2 r", "更新量的缩放，相对于 r。LoRA 默认 2r"),
    "adapter.dropout": ("share of the adapter's input that is dropped in training", "训练时适配器输入的丢弃比例"),
    "adapter.target": (
        "layers to adapt: auto, all-linear, a list of names, or a regular expression",
        "要适配的层：auto、all-linear、名称列表或正则表达式",
    ),
    "adapter.modules_to_save": ("modules trained whole and saved with the adapter", "完整训练并随适配器保存的模块"),
    "adapter.options": ("further fields of the method's own config", "该方法配置类的其他字段"),
    "train": ("how it is trained", "如何训练"),
    "train.epochs": ("times that the data is seen", "遍历数据的次数"),
    "train.steps": ("optimizer steps; overrides epochs", "优化步数；优先于 epochs"),
    "train.lr": ("peak learning rate", "学习率峰值"),
    "train.batch": (
        "samples in memory at once; an optimizer step sees batch x accumulate",
        "同时处理的样本数；一步优化使用 batch × accumulate 条",
    ),
    "train.accumulate": (
        "batches per optimizer step; the loss is the mean over all their tokens, as in one large batch",
        "每步优化累积的批数；损失按全部词元平均，与一个大批次相同",
    ),
    "train.schedule": ("the learning rate after the warm-up", "预热之后的学习率变化"),
    "train.warmup": (
        "share of the steps (below 1) or steps in which the rate rises",
        "学习率上升阶段：占比（小于 1）或步数",
    ),
    "train.optimizer": ("the optimizer", "优化器"),
    "train.weight_decay": ("pull of the weights towards 0", "权重衰减"),
    "train.clip": ("largest norm of the gradient; 0: no limit", "梯度范数上限；0 表示不限"),
    "train.grad_checkpoint": (
        "compute activations twice instead of keeping them: less memory, about 30% slower",
        "重算激活而不保存：省内存，约慢 30%",
    ),
    "train.batching": (
        "grouped: samples of like length share a batch, so little is padding",
        "grouped：长度相近的样本同批，减少填充",
    ),
    "train.eval_every": (
        "steps between evaluations, or share of all steps (up to 1)",
        "评估间隔：步数，或占总步数的比例（不超过 1）",
    ),
    "train.save_every": (
        "steps between checkpoints, or share of all steps (up to 1)",
        "检查点间隔：步数，或占总步数的比例（不超过 1）",
    ),
    "train.save_total_limit": ("checkpoints kept, besides the best", "保留的检查点个数（最佳检查点另计）"),
    "train.keep": (
        "the adapter that the run ends with: lowest held-out loss, or the last",
        "运行结束时保留的适配器：留出损失最低的，或最后的",
    ),
    "train.early_stop": ("stop when the held-out loss no longer falls", "留出损失不再下降时停止"),
    "train.early_stop.patience": ("evaluations without progress", "允许没有进步的评估次数"),
    "train.early_stop.min_change": ("a fall of the loss that counts as progress", "算作进步的最小下降量"),
    "train.seed": ("of the start, the order and the dropout", "初始化、顺序与 dropout 的随机种子"),
    "train.threads": ("CPU threads; default: torch's choice", "CPU 线程数；默认由 torch 决定"),
    "train.shard": (
        "training in several processes (`peft train --launcher`): split the frozen base over them by FSDP2, rather than keep a copy in each",
        "多进程训练（`peft train --launcher`）时，用 FSDP2 把冻结的基座分片存放，而不是每个进程一份",
    ),
    "train.max_memory": (
        "what the run may use, such as 7GiB; `peft plan` checks it",
        "允许使用的内存，例如 7GiB；由 `peft plan` 检查",
    ),
    "preference": ("for dpo, orpo and kto", "用于 dpo、orpo 与 kto"),
    "preference.beta": (
        "strength of the preference (dpo, kto: pull towards the base)",
        "偏好强度（dpo、kto：向基座靠拢的程度）",
    ),
    "preference.desirable_weight": ("kto: weight of good answers", "kto：好回答的权重"),
    "preference.undesirable_weight": ("kto: weight of bad answers", "kto：坏回答的权重"),
    "eval": ("how the result is judged", "如何评测"),
    "eval.metrics": ("metrics; auto: those of the task", "指标；auto：该任务的指标"),
    "eval.generate": ("how answers are written", "生成回答的方式"),
    "eval.generate.max_new_tokens": ("length of an answer, at most", "回答的最大长度"),
    "eval.generate.temperature": ("0: always the likeliest token", "0：总取最可能的词元"),
    "eval.baseline": ("score the base model too", "同时评测基座模型"),
    "eval.tokenizer": (
        "what ROUGE and BLEU count for Chinese: characters or words",
        "中文 ROUGE 与 BLEU 的单位：字或词",
    ),
    "eval.sample": ("rows to judge, at most", "最多评测的行数"),
    "eval.batch": ("samples at once", "同时处理的样本数"),
    "eval.forgetting": (
        "general text whose perplexity shows what was forgotten: auto (short texts that come with the tool), none, or a "
        "text file",
        "用于检查遗忘的通用文本（比较困惑度）：auto（工具自带的短文）、none，或一个文本文件",
    ),
    "track": ("what is recorded", "记录什么"),
    "track.plots": ("draw plots (PNG needs matplotlib)", "绘图（PNG 需要 matplotlib）"),
    "track.log_every": ("steps between two lines of trainer_log.jsonl", "trainer_log.jsonl 的记录间隔（步）"),
    "output": ("where runs are kept", "运行结果放在哪里"),
    "output.dir": ("folder of all runs", "所有运行的文件夹"),
    "output.name": ("name of this experiment; default: the recipe file's", "实验名称；默认取配方文件名"),
}

SOURCE = {
    "path": ("a file or folder", "文件或文件夹"),
    "format": ("auto, or the name of a format (`peft data` shows it)", "auto 或格式名（`peft data` 会显示）"),
    "map": ("field of the format: column of the file", "格式字段: 文件中的列"),
    "encoding": ("auto, or for example gb18030", "auto，或例如 gb18030"),
    "sheet": ("sheet of an xlsx file; default: the first", "xlsx 的工作表；默认第一个"),
    "sample": ("rows to take, at random", "随机抽取的行数"),
}
for _section in ("data.train", "data.eval", "data.test"):
    HELP.update({f"{_section}.{name}": text for name, text in SOURCE.items()})


def explain(name: str, language: str) -> str:
    return HELP[name][language == "zh"]
