"""What the command line itself says."""

TABLE = {
    "cli.about": {
        "en": "Parameter-efficient fine-tuning: adapt a large frozen model by training a small part of it.",
        "zh": "参数高效微调：冻结大模型，只训练其中一小部分。",
    },
    "cli.commands": {"en": "commands:", "zh": "命令："},
    "cli.more": {
        "en": "peft COMMAND --help lists the options of a command.",
        "zh": "peft 命令 --help 列出该命令的选项。",
    },
    "cli.unknown_command": {
        "en": "unknown command `{name}`. Did you mean `{nearest}`?",
        "zh": "没有命令 `{name}`。是否想用 `{nearest}`？",
    },
    "cli.no_such_command": {
        "en": "unknown command `{name}`. There is: {known}.",
        "zh": "没有命令 `{name}`。可用的有：{known}。",
    },
    "cli.error": {"en": "peft {command}: error: {text}", "zh": "peft {command}：错误：{text}"},
    "cli.unexpected": {
        "en": "{kind}: {error} (`--debug` shows where)",
        "zh": "{kind}: {error}（用 `--debug` 查看出处）",
    },
    "cli.os_error": {"en": "{path}: {reason}", "zh": "{path}：{reason}"},
    "cli.missing_package": {
        "en": "The package `{package}` is not installed. Install it with: pip install {how}",
        "zh": "没有安装 `{package}`。请运行：pip install {how}",
    },
    "cli.interrupted": {"en": "interrupted", "zh": "已中断"},
    "cli.unknown_option": {
        "en": "unknown option {option}. {nearest}`peft {command} --help` lists the options.",
        "zh": "没有选项 {option}。{nearest}`peft {command} --help` 列出所有选项。",
    },
    "cli.did_you_mean": {"en": "Did you mean {name}? ", "zh": "是否想用 {name}？"},
    "cli.offline": {
        "en": "--offline forbids connecting to {address}. Give a folder on this machine, or leave --offline out.",
        "zh": "--offline 不允许连接 {address}。请改用本机上的文件夹，或去掉 --offline。",
    },
    "cli.lang_help": {"en": "language of the messages (default: from the locale)", "zh": "消息语言（默认取自系统）"},
    "cli.debug_help": {"en": "show the traceback of an error", "zh": "出错时显示完整的调用栈"},
    "cli.offline_help": {"en": "open no connection, to any machine", "zh": "不连接任何机器"},
    "cli.json_help": {
        "en": "print the result as JSON on stdout; messages go to stderr",
        "zh": "以 JSON 把结果写到标准输出；消息写到标准错误",
    },
    "cli.quiet_help": {"en": "say nothing but errors and the result", "zh": "除错误与结果外不输出"},
}
