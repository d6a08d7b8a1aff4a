"""What is said about merging, exporting and chatting."""

TABLE = {
    "deploy.merged": {
        "en": "merged into {path}: logits differ by {difference} from the adapted model (the adapter moves them by "
        "{effect}); the written copy was read back and is the same.",
        "zh": "已合并到 {path}：与带适配器的模型相比，logits 最多相差 {difference}（适配器本身的影响为 {effect}）；写出的副本已读回核对，完全一致。",
    },
    "deploy.onto_original": {
        "en": "these are the base's weights before quantization, not those that the adapter was trained on: logits differ "
        "by {moved} from the trained model, where the adapter moves them by {effect}. Evaluate this copy, or merge "
        "without --onto.",
        "zh": "这里用的是量化之前的基座权重，而适配器不是在它们上面训练的：与训练好的模型相比，logits 最多相差 {moved}，"
        "而适配器本身的影响为 {effect}。请评估这个副本，或去掉 --onto 再合并。",
    },
    "deploy.exported": {
        "en": "{kind} written to {path}; self-test: {agreed} of {total} tokens as the source gives them.",
        "zh": "已把 {kind} 写到 {path}；自检：{total} 个词元中有 {agreed} 个与来源一致。",
    },
    "deploy.adapter_for_vllm": {
        "en": "vLLM can serve this adapter on its base as it is: {path}/serve.sh starts it.",
        "zh": "vLLM 可以直接在基座上加载这个适配器：用 {path}/serve.sh 启动。",
    },
    "deploy.merged_for_vllm": {
        "en": "vLLM cannot serve this adapter beside its base ({reason}), so the merged model was written.",
        "zh": "vLLM 不能在基座旁加载这个适配器（{reason}），因此写出了合并后的模型。",
    },
    "deploy.cannot_merge": {
        "en": "{method} cannot be merged: what it does is no fixed weight. Use the run's folder as it is, with peft.",
        "zh": "{method} 不能合并：它的作用不是一个固定的权重。请直接用 peft 加载该运行的文件夹。",
    },
    "deploy.not_the_same": {
        "en": "the copy is not the same model: logits differ by {difference}, allowed are {limit}. Nothing was written.",
        "zh": "副本与原模型不同：logits 相差 {difference}，允许值为 {limit}。没有写出任何文件。",
    },
    "deploy.not_empty": {
        "en": "{path} exists already and is not an empty folder; choose another with -o.",
        "zh": "{path} 已存在且不是空文件夹；请用 -o 另选一个。",
    },
    "deploy.read_only": {
        "en": "cannot write into {path}; choose another folder with -o.",
        "zh": "无法写入 {path}；请用 -o 另选一个文件夹。",
    },
    "deploy.no_gguf": {
        "en": "a GGUF file can be written of Llama models with byte-level BPE only, this is {what}. "
        "`--to hf` writes the merged model, which llama.cpp's own converter may know.",
        "zh": "目前只能为使用字节级 BPE 的 Llama 模型写 GGUF，而这是 {what}。可以用 `--to hf` 写出合并后的模型，再用 llama.cpp 的转换工具。",
    },
    "deploy.gguf_differs": {
        "en": "the GGUF file does not give back the model: logits differ by {difference}, allowed are {limit}. "
        "Nothing was written.",
        "zh": "GGUF 文件读回后与模型不同：logits 相差 {difference}，允许值为 {limit}。没有写出任何文件。",
    },
    "deploy.generative_only": {
        "en": "{what} is for models that write text; this run's task is {task}. `--to hf` writes it for transformers.",
        "zh": "{what} 只适用于生成文本的模型；这个运行的任务是 {task}。请用 `--to hf` 写成 transformers 模型。",
    },
    "deploy.template_too_clever": {
        "en": "the chat template cannot be written as an Ollama template: {problem}. Use `--to gguf`.",
        "zh": "无法把对话模板改写为 Ollama 模板：{problem}。请改用 `--to gguf`。",
    },
    "deploy.chat_hello": {
        "en": "{run}: type a message, or /help. Ctrl-D ends.",
        "zh": "{run}：请输入消息，/help 查看帮助，Ctrl-D 结束。",
    },
    "deploy.chat_help": {
        "en": "/new begins anew · /undo takes the last turn back · /base on|off answers without the adapter · "
        "/save FILE appends this chat as a training sample · /quit",
        "zh": "/new 重新开始 · /undo 撤回上一轮 · /base on|off 不用适配器回答 · /save 文件 把这段对话存为训练样本 · /quit 退出",
    },
    "deploy.chat_saved": {"en": "appended to {path}.", "zh": "已追加到 {path}。"},
    "deploy.chat_nothing": {"en": "there is nothing to take back or save yet.", "zh": "还没有可以撤回或保存的内容。"},
    "deploy.chat_unknown": {
        "en": "unknown: {word}; /help lists what there is.",
        "zh": "未知命令：{word}；/help 列出全部命令。",
    },
    "deploy.chat_base": {"en": "base", "zh": "基座"},
    "deploy.chat_tuned": {"en": "tuned", "zh": "微调后"},
    "deploy.no_adapter": {
        "en": "{path} has no adapter_config.json, so there is no adapter in it.",
        "zh": "{path} 中没有 adapter_config.json，不是适配器文件夹。",
    },
    "deploy.import_no_file": {"en": "there is no file {path}.", "zh": "没有文件 {path}。"},
    "deploy.import_broken": {"en": "{path} is no GGUF file: {problem}", "zh": "{path} 不是 GGUF 文件：{problem}"},
    "deploy.import_done": {
        "en": "{path} holds the model: {parameters:,} parameters. Name this folder in model.path.",
        "zh": "模型已写到 {path}，共 {parameters:,} 个参数。在 model.path 中填写这个文件夹即可。",
    },
}
