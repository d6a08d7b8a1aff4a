"""What is said about data."""

TABLE = {
    "data.none": {
        "en": "the recipe names no data; set data.train to a file.",
        "zh": "配方中没有数据；请把 data.train 设为一个文件。",
    },
    "data.no_file": {"en": "there is no data file {path}.", "zh": "没有数据文件 {path}。"},
    "data.unknown_kind": {
        "en": "{path}: unknown kind of file; known are {known}.",
        "zh": "{path}：不支持的文件类型；支持 {known}。",
    },
    "data.empty": {"en": "{path} holds no rows.", "zh": "{path} 中没有数据行。"},
    "data.empty_folder": {
        "en": "{path} holds no file of a known kind ({known}).",
        "zh": "{path} 中没有支持的文件（{known}）。",
    },
    "data.encoding": {
        "en": "{path} is no text in {tried}; save it as UTF-8, or set `encoding` of this source.",
        "zh": "{path} 不是 {tried} 编码的文本；请另存为 UTF-8，或为该数据源设置 `encoding`。",
    },
    "data.no_encoding": {"en": "there is no encoding `{encoding}`.", "zh": "没有编码 `{encoding}`。"},
    "data.column_twice": {"en": "{path}: two columns are called `{column}`.", "zh": "{path}：有两列都叫 `{column}`。"},
    "data.too_many_cells": {
        "en": "{path}, line {line}: {found} cells, but {expected} columns; put quotes around text with commas.",
        "zh": "{path} 第 {line} 行：有 {found} 个单元格，但只有 {expected} 列；含逗号的文本请加引号。",
    },
    "data.bad_line": {"en": "{path}, line {line}: {problem}", "zh": "{path} 第 {line} 行：{problem}"},
    "data.bad_json": {"en": "{path} cannot be read: {problem}", "zh": "无法读取 {path}：{problem}"},
    "data.no_object": {
        "en": "{path}, line {line}: expected an object {{...}}, found {found}.",
        "zh": "{path} 第 {line} 行：应为对象 {{...}}，实际是 {found}。",
    },
    "data.no_rows_in_json": {"en": "{path} holds no list of objects.", "zh": "{path} 中没有对象列表。"},
    "data.no_sheet": {
        "en": "{path} has no sheet `{sheet}`; there is {known}.",
        "zh": "{path} 中没有工作表 `{sheet}`；有 {known}。",
    },
    "data.no_column": {
        "en": "{path} has no column `{column}`; it has {columns}.",
        "zh": "{path} 中没有列 `{column}`；现有 {columns}。",
    },
    "data.no_format": {
        "en": "there is no format `{format}`; known are {known}.",
        "zh": "没有格式 `{format}`；可用 {known}。",
    },
    "data.missing_field": {
        "en": "{path}: format {format} needs a column for `{field}`; there is {columns}. Write map: {{{field}: COLUMN}}.",
        "zh": "{path}：格式 {format} 需要对应 `{field}` 的列；现有 {columns}。请写 map: {{{field}: 列名}}。",
    },
    "data.other_task": {
        "en": "{path} looks like {format} data (columns {columns}), which task {task} cannot learn from.",
        "zh": "{path} 看起来是 {format} 数据（列 {columns}），任务 {task} 无法使用。",
    },
    "data.unknown_columns": {
        "en": "{path}: what do the columns {columns} mean? Task {task} knows {wanted}. Say which column is which: "
        "data.train.0.map={{field: column}}.",
        "zh": "{path}：无法判断各列的含义：{columns}。任务 {task} 支持 {wanted}。"
        "请指明对应关系：data.train.0.map={{字段: 列名}}。",
    },
    "data.bad_rows": {
        "en": "{path}: {count} rows cannot be used (row {rows}): {problem} Correct them, or set data.invalid=drop.",
        "zh": "{path}：有 {count} 行无法使用（第 {rows} 行）：{problem}请修正，或设置 data.invalid=drop。",
    },
    "data.field_empty": {"en": "`{field}` is empty.", "zh": "`{field}` 为空。"},
    "data.no_messages": {"en": "the messages are no list of objects.", "zh": "消息不是对象列表。"},
    "data.bad_message": {"en": "a message has no role or no text: {turn}.", "zh": "消息缺少角色或文本：{turn}。"},
    "data.bad_history": {
        "en": "`history` must be pairs of question and answer.",
        "zh": "`history` 应为（问，答）的列表。",
    },
    "data.no_answer": {"en": "no message is the assistant's.", "zh": "没有助手的消息。"},
    "data.many_turns": {
        "en": "a chat of several turns has no one source and target.",
        "zh": "多轮对话无法转成单一的输入与输出。",
    },
    "data.tags_differ": {"en": "{tokens} tokens, but {tags} tags.", "zh": "{tokens} 个词，却有 {tags} 个标签。"},
    "data.answer_not_there": {"en": "the answer `{answer}` is not in the text.", "zh": "原文中没有答案 `{answer}`。"},
    "data.same_answers": {"en": "chosen and rejected are the same.", "zh": "更好与更差的回答相同。"},
    "data.not_a_rating": {"en": "`{value}` is neither true nor false.", "zh": "`{value}` 既不是真也不是假。"},
    "data.bad_prompt": {
        "en": "data.prompt `{prompt}` cannot be filled in: {problem}; there is {fields}.",
        "zh": "data.prompt `{prompt}` 无法填充：{problem}；可用字段 {fields}。",
    },
    "data.unknown_label": {
        "en": "the data has the label `{label}`, which data.labels does not name ({known}).",
        "zh": "数据中有标签 `{label}`，但 data.labels 没有列出（{known}）。",
    },
    "data.label_not_trained": {
        "en": "label `{label}` is none of {known}; did you mean `{nearest}`?",
        "zh": "标签 `{label}` 不在 {known} 之中；是否应为 `{nearest}`？",
    },
    "data.one_label": {
        "en": "all training rows have the label `{label}`: there is nothing to tell apart.",
        "zh": "所有训练数据都是标签 `{label}`：没有可区分的内容。",
    },
    "data.nothing_left": {
        "en": "no rows are left to train on; lower data.eval.split.",
        "zh": "没有剩下可训练的数据；请调小 data.eval.split。",
    },
}
