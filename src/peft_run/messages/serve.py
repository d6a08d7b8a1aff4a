"""What the server says."""

TABLE = {
    "serve.unknown_adapter": {
        "en": "the model `{name}` does not exist here; GET /v1/models lists those that do.",
        "zh": "模型 `{name}` 不存在；GET /v1/models 可列出现有的模型。",
    },
    "serve.changed_on_disk": {
        "en": "the files of adapter `{name}` have changed since it was loaded; load it again to serve the new ones.",
        "zh": "适配器 `{name}` 的文件自加载后已改变；请重新加载以使用新文件。",
    },
    "serve.refused": {
        "en": "adapter `{name}` cannot be served: {problem}",
        "zh": "无法提供适配器 `{name}`：{problem}",
    },
    "serve.larger_than_budget": {
        "en": "adapter `{name}` takes {bytes:,} bytes, more than the budget of {budget:,} for all of them.",
        "zh": "适配器 `{name}` 需要 {bytes:,} 字节，超过全部适配器的预算 {budget:,}。",
    },
    "serve.no_room": {
        "en": "no memory for adapter `{name}`: those loaded are pinned or in use (budget {budget:,} bytes).",
        "zh": "没有内存加载适配器 `{name}`：已加载的都被固定或正在使用（预算 {budget:,} 字节）。",
    },
    "serve.bad_name": {
        "en": "`{name}` cannot name an adapter: 1 to 64 of the characters A-Z a-z 0-9 . _ -",
        "zh": "`{name}` 不能作为适配器名：只能用 1 到 64 个字符 A-Z a-z 0-9 . _ -",
    },
    "serve.name_taken": {
        "en": "`{name}` is the base model's name.",
        "zh": "`{name}` 是基础模型的名字。",
    },
    "serve.no_adapter": {
        "en": "adapter `{name}`: there is no {file} at its path.",
        "zh": "适配器 `{name}`：其路径中没有 {file}。",
    },
    "serve.broken_weights": {
        "en": "adapter `{name}`: the weights file is damaged.",
        "zh": "适配器 `{name}`：权重文件已损坏。",
    },
    "serve.busy": {
        "en": "the queue of {limit} requests is full; try again in a moment.",
        "zh": "请求队列（{limit} 个）已满；请稍后再试。",
    },
    "serve.closing": {
        "en": "the server is shutting down.",
        "zh": "服务器正在关闭。",
    },
    "serve.model_kind": {
        "en": "models of kind {kind} cannot be served yet: they keep more than keys and values between tokens.",
        "zh": "暂不能提供 {kind} 类模型：它们在词元之间保存的不只是键和值。",
    },
}
