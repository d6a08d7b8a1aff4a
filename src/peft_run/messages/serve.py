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
        "en": "adapter `{name}` takes {bytes:,} bytes, more than the {budget:,} that an adapter may take here.",
        "zh": "适配器 `{name}` 需要 {bytes:,} 字节，超过此处允许的 {budget:,}。",
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
        "en": "`{name}` is taken, or cannot name a model: 1 to 64 of the characters A-Z a-z 0-9 . _ -",
        "zh": "`{name}` 已被占用，或不能作为模型名：只能用 1 到 64 个字符 A-Z a-z 0-9 . _ -",
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
    "serve.other_task": {
        "en": "adapter `{name}` was trained for the task {task} and writes no text; start the server with its run.",
        "zh": "适配器 `{name}` 是为任务 {task} 训练的，不生成文本；请用它的训练运行启动服务器。",
    },
    "serve.other_tokenizer": {
        "en": "adapter `{name}` was trained with another tokenizer.",
        "zh": "适配器 `{name}` 训练时使用了另一个分词器。",
    },
    "serve.other_template": {
        "en": "adapter `{name}` brings a chat template of its own, which is taken only when the server starts with it.",
        "zh": "适配器 `{name}` 自带对话模板，只有在服务器启动时指定它才会被采用。",
    },
    "serve.outside": {
        "en": "adapter `{name}`: its path is not inside the folder that adapters may be loaded from.",
        "zh": "适配器 `{name}`：其路径不在允许加载适配器的文件夹内。",
    },
    "serve.too_long": {
        "en": "the prompt has {prompt} tokens and {asked} were asked for; together at most {limit} fit.",
        "zh": "提示有 {prompt} 个词元，又要求 {asked} 个；合计最多 {limit} 个。",
    },
    "serve.unknown_token": {
        "en": "a token id is not below the vocabulary's size, {size}.",
        "zh": "词元编号超出词表大小 {size}。",
    },
    "serve.needs_key": {
        "en": "other machines could reach {host}: set a key with --api-key or PEFT_API_KEY, or serve on 127.0.0.1.",
        "zh": "其他机器可以访问 {host}：请用 --api-key 或 PEFT_API_KEY 设置密钥，或只在 127.0.0.1 上提供服务。",
    },
    "serve.nothing": {
        "en": "say what to serve: one or more runs, or --base MODEL.",
        "zh": "请指定要提供的内容：一个或多个训练运行，或 --base 模型。",
    },
    "serve.other_base": {
        "en": "{run} was trained on another base model than the first run.",
        "zh": "{run} 与第一个运行的基础模型不同。",
    },
    "serve.full_run": {
        "en": "{run} trained the whole model: there is no adapter in it to serve beside others.",
        "zh": "{run} 训练了整个模型：其中没有可与其他适配器一起提供的适配器。",
    },
    "serve.bad_pair": {
        "en": "--adapter wants name=path, got `{given}`.",
        "zh": "--adapter 需要 名称=路径，得到的是 `{given}`。",
    },
    "serve.bad_number": {
        "en": "{option} must be at least {least}.",
        "zh": "{option} 至少为 {least}。",
    },
    "serve.lost": {
        "en": "not loaded again: {problem}",
        "zh": "未能重新加载：{problem}",
    },
    "serve.packed": {
        "en": "Weights are kept in the order of oneDNN: {gain} times faster on this processor.",
        "zh": "权重按 oneDNN 的顺序存放：在本机处理器上快 {gain} 倍。",
    },
    "serve.ready": {
        "en": "{url}/v1 serves {models}. Ctrl-C stops it.",
        "zh": "{url}/v1 正在提供 {models}。按 Ctrl-C 停止。",
    },
    "serve.other_route": {
        "en": "the model `{name}` answers {route}.",
        "zh": "模型 `{name}` 只回答 {route}。",
    },
    "serve.not_answered": {
        "en": "the text is longer than `{name}` can read.",
        "zh": "文本超过 `{name}` 能读的长度。",
    },
    "serve.adapters_need_base": {
        "en": "adapters need a base model that writes: say which with --base MODEL.",
        "zh": "适配器需要一个能生成文本的基础模型：请用 --base 模型 指定。",
    },
    "serve.broken_json": {
        "en": "adapter `{name}`: {file} is too large or is not what it should be.",
        "zh": "适配器 `{name}`：{file} 过大或内容不正确。",
    },
    "serve.loaded_already": {
        "en": "adapter `{name}` is loaded already; load_inplace=true replaces it.",
        "zh": "适配器 `{name}` 已加载；用 load_inplace=true 可替换它。",
    },
}
