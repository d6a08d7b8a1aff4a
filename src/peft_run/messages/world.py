"""What is said about training in several processes."""

TABLE = {
    "world.together": {
        "en": "{size} processes; each takes its share of every batch; base: {base}",
        "zh": "{size} 个进程，各自计算每批数据的一部分；基座：{base}",
    },
    "world.copied": {"en": "a copy in each", "zh": "每个进程一份"},
    "world.sharded": {"en": "sharded over them", "zh": "分片存放"},
    "world.deepspeed": {
        "en": "`peft train` shards the base by FSDP2, not by DeepSpeed; start it with `--launcher torchrun train.shard=true`, "
        "or with the file fsdp2.yaml of `peft recipes cp multi-gpu`. DeepSpeed's files are for scripts of your own.",
        "zh": "`peft train` 用 FSDP2 而不是 DeepSpeed 来分片；请用 `--launcher torchrun train.shard=true` 启动，"
        "或使用 `peft recipes cp multi-gpu` 中的 fsdp2.yaml。DeepSpeed 的配置供您自己的脚本使用。",
    },
    "world.quantized": {
        "en": "a quantized base (model.quant) cannot be sharded; set train.shard=false: each process then has a copy.",
        "zh": "量化的基座（model.quant）不能分片；请设 train.shard=false，每个进程各存一份。",
    },
    "world.full": {
        "en": "train.shard is for a frozen base; adapter.method=full trains all of it.",
        "zh": "train.shard 用于冻结的基座；adapter.method=full 会训练全部参数。",
    },
    "world.old_torch": {
        "en": "train.shard needs torch 2.7 or newer, whose FSDP2 can leave parameters out.",
        "zh": "train.shard 需要 torch 2.7 或更新版本（其 FSDP2 可以排除部分参数）。",
    },
    "world.no_blocks": {
        "en": "{model} does not say which of its parts belong together (_no_split_modules): it cannot be sharded.",
        "zh": "{model} 没有声明不可拆分的部分（_no_split_modules），无法分片。",
    },
    "world.bad_number": {
        "en": "the environment variable {name} must be a number from {least} on, got `{value}`.",
        "zh": "环境变量 {name} 必须是不小于 {least} 的整数，实际为 `{value}`。",
    },
    "world.no_address": {
        "en": "with NNODES above 1, MASTER_ADDR must name the machine of NODE_RANK 0.",
        "zh": "NNODES 大于 1 时，必须用 MASTER_ADDR 指明 NODE_RANK 为 0 的机器。",
    },
    "world.differ": {
        "en": "the processes ended with different adapters; nothing was saved. Please report this.",
        "zh": "各进程得到的适配器不一致；没有保存。请报告此问题。",
    },
    "world.arguments": {
        "en": "arguments after `--` are the launcher's; give --launcher torchrun or accelerate.",
        "zh": "`--` 之后的参数属于启动器；请指定 --launcher torchrun 或 accelerate。",
    },
}
