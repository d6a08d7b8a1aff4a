"""What single tasks say."""

TABLE = {
    "tasks.question_too_long": {
        "en": "a question alone fills {limit} tokens; raise data.max_length.",
        "zh": "仅问题就占满 {limit} 个词元；请调大 data.max_length。",
    },
    "tasks.no_answer_inside": {
        "en": "no answer is whole in any window; raise data.max_length.",
        "zh": "没有任何窗口包含完整的答案；请调大 data.max_length。",
    },
    "tasks.needs_adapter": {
        "en": "task {task} compares with the base model, which adapter.method=full does not keep; use an adapter or orpo.",
        "zh": "任务 {task} 需要与基座模型比较，而 adapter.method=full 不保留基座；请使用适配器，或改用 orpo。",
    },
    "tasks.kto_batch": {
        "en": "kto compares answers with those to other prompts of the batch; set train.batch to 2 or more.",
        "zh": "kto 需要与同批其他提示的回答比较；请把 train.batch 设为 2 或更大。",
    },
}
