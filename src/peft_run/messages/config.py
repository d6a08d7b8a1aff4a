"""What is said about recipes."""

TABLE = {
    "config.no_file": {"en": "there is no recipe {file}.", "zh": "没有配方文件 {file}。"},
    "config.too_large": {
        "en": "{file} has more than {limit} bytes: that is no recipe.",
        "zh": "{file} 超过 {limit} 字节，不是配方文件。",
    },
    "config.no_yaml": {"en": "{file} is not valid YAML: {problem}", "zh": "{file} 不是合法的 YAML：{problem}"},
    "config.no_mapping": {
        "en": "{file} must hold `key: value` lines, found {found}.",
        "zh": "{file} 应由“键: 值”组成，实际是 {found}。",
    },
    "config.no_override": {
        "en": "`{text}` is no override; write section.key=value, for example train.lr=1e-4.",
        "zh": "`{text}` 不是有效的覆盖项；请写成 section.key=value，例如 train.lr=1e-4。",
    },
    "config.no_place": {
        "en": "`{key}`: the list has {count} entries, counted from 0.",
        "zh": "`{key}`：该列表有 {count} 项，从 0 开始计数。",
    },
    "config.invalid": {"en": "{file}: {problem}", "zh": "{file}：{problem}"},
    "config.unknown_key": {
        "en": "there is no key `{key}`. {hint}`peft config explain` lists them all.",
        "zh": "没有键 `{key}`。{hint}`peft config explain` 列出全部。",
    },
    "config.valid": {"en": "{file} is a valid recipe.", "zh": "{file} 是有效的配方。"},
    "config.default": {"en": "default", "zh": "默认值"},
    "config.type": {"en": "type", "zh": "类型"},
    "config.also": {"en": "also called", "zh": "别名"},
}
