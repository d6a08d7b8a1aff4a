"""What is said about methods and their settings."""

TABLE = {
    "adapter.no_method": {
        "en": "there is no method `{method}`; did you mean `{nearest}`? `peft methods` lists them all.",
        "zh": "没有方法 `{method}`；是否应为 `{nearest}`？`peft methods` 列出全部。",
    },
    "adapter.no_field": {
        "en": "adapter.{field}: the method {method} has no such setting.",
        "zh": "adapter.{field}：方法 {method} 没有该设置。",
    },
    "adapter.no_option": {
        "en": "adapter.options.{field}: the method {method} has no such field; did you mean `{nearest}`?",
        "zh": "adapter.options.{field}：方法 {method} 没有该字段；是否应为 `{nearest}`？",
    },
    "adapter.loftq": {
        "en": "model.quant.loftq is for adapter.method=lora and for tasks other than DPO and KTO, which compare with the "
        "base: got method {method}, task {task}. Remove model.quant.loftq.",
        "zh": "model.quant.loftq 只用于 adapter.method=lora，且不能用于与基座比较的 DPO 和 KTO：当前方法是 {method}，任务是 {task}。"
        "请去掉 model.quant.loftq。",
    },
    "adapter.full_quantized": {
        "en": "adapter.method=full trains every weight, which quantized weights cannot be; remove model.quant.",
        "zh": "adapter.method=full 训练全部权重，而量化权重无法训练；请去掉 model.quant。",
    },
}
