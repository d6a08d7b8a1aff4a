"""What is said about chat templates and what is learnt of a chat."""

TABLE = {
    "template.none": {
        "en": "the tokenizer has no chat template; set data.template to plain or to a .jinja file.",
        "zh": "分词器没有对话模板；请把 data.template 设为 plain 或 .jinja 文件。",
    },
    "template.no_file": {
        "en": "data.template `{path}` is neither auto, tokenizer, plain nor a file.",
        "zh": "data.template `{path}` 不是 auto、tokenizer、plain，也不是文件。",
    },
    "template.failed": {"en": "the chat template fails: {problem}", "zh": "对话模板出错：{problem}"},
    "template.no_prefix": {
        "en": "the chat template writes something else before an answer in training than when it asks for one; "
        "what is learnt would not be what is used. Use another data.template.",
        "zh": "对话模板在训练时写在回答之前的内容，与生成时不同；学到的将不是实际使用的。请更换 data.template。",
    },
    "template.no_stop": {
        "en": "no stop token is ever learnt: the template closes answers with no special token, so the model would never "
        "stop. Add one to the template, or use data.template=plain.",
        "zh": "没有学习任何停止符：模板没有用特殊符号结束回答，模型将不会停止。请在模板中加入停止符，或用 data.template=plain。",
    },
    "template.nothing_learnt": {
        "en": "{count} of {total} samples have no token to learn (sample {rows}).",
        "zh": "{total} 条样本中有 {count} 条没有可学习的词元（第 {rows} 条）。",
    },
    "template.two_starts": {
        "en": "samples begin with the start token twice; take it out of the template.",
        "zh": "样本以两个起始符开头；请从模板中去掉一个。",
    },
    "template.overlong": {
        "en": "{count} of {total} samples have more than {limit} tokens: {what}.",
        "zh": "{total} 条样本中有 {count} 条超过 {limit} 个词元：{what}。",
    },
    "template.dropped": {"en": "dropped", "zh": "已丢弃"},
    "template.cut": {"en": "cut", "zh": "已截断"},
    "template.split": {"en": "split", "zh": "已切分"},
    "template.all_dropped": {
        "en": "all samples have more than {limit} tokens; raise data.max_length.",
        "zh": "所有样本都超过 {limit} 个词元；请调大 data.max_length。",
    },
}
