"""What is said about ready recipes."""

TABLE = {
    "recipes.none": {
        "en": "there is no recipe `{name}`; did you mean `{nearest}`? `peft recipes` lists them.",
        "zh": "没有配方 `{name}`；是否应为 `{nearest}`？`peft recipes` 列出全部。",
    },
    "recipes.there_already": {
        "en": "{path} exists already; choose another folder.",
        "zh": "{path} 已存在；请换一个文件夹。",
    },
    "recipes.copied": {"en": "Wrote {count} files to {path}", "zh": "已写入 {count} 个文件到 {path}"},
    "recipes.next": {
        "en": "What to type next\n  cd {path}\n  peft data recipe.yaml\n  peft train recipe.yaml",
        "zh": "接下来可以输入\n  cd {path}\n  peft data recipe.yaml\n  peft train recipe.yaml",
    },
}
