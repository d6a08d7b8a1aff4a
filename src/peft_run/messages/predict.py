"""What prediction says."""

TABLE = {
    "predict.reading": {
        "en": "{count} rows to answer: {format} ({mapping})",
        "zh": "待回答 {count} 行：{format}（{mapping}）",
    },
    "predict.done": {"en": "{count} answers in {path}", "zh": "{count} 个回答已写入 {path}"},
    "predict.unknown_kind": {
        "en": "-o {path}: answers are written as {known}.",
        "zh": "-o {path}：回答可写成 {known}。",
    },
    "predict.no_folder": {"en": "there is no folder {path}; make it first.", "zh": "没有文件夹 {path}；请先创建。"},
    "predict.bad_map": {
        "en": "--map {given}: write field=column, for example text=review.",
        "zh": "--map {given}：请写成 字段=列名，例如 text=评论。",
    },
}
