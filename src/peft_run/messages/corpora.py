"""What is said while real data is fetched."""

TABLE = {
    "corpora.none": {
        "en": "there is no data set `{name}`; did you mean `{nearest}`? There is {known}.",
        "zh": "没有数据集 `{name}`；是否应为 `{nearest}`？可用：{known}。",
    },
    "corpora.fetching": {"en": "Fetching {what}", "zh": "正在获取 {what}"},
    "corpora.written": {
        "en": "Wrote {train} rows to train on and {test} to test with to {path}",
        "zh": "已写入 {path}：训练 {train} 条，测试 {test} 条",
    },
    "corpora.licence": {"en": "  source: {source}\n  licence: {licence}", "zh": "  来源：{source}\n  许可：{licence}"},
    "corpora.checksum": {"en": "  sha256 {file}: {sha256}", "zh": "  sha256 {file}：{sha256}"},
    "corpora.next": {
        "en": "Train on it: peft train RECIPE data.train={train} data.test={test}",
        "zh": "用它训练：peft train 配方 data.train={train} data.test={test}",
    },
    "corpora.offline": {
        "en": "{what} is not in the cache, and --offline forbids fetching it; run the command once without.",
        "zh": "缓存中没有 {what}，而 --offline 不允许下载；请先不带该选项运行一次。",
    },
    "corpora.no_client": {
        "en": "{what} is fetched with `{client}`, which is not on this machine; install it.",
        "zh": "获取 {what} 需要 `{client}`，本机没有；请先安装。",
    },
    "corpora.failed": {"en": "{what} cannot be fetched: {problem}", "zh": "无法获取 {what}：{problem}"},
    "corpora.nothing": {
        "en": "`{client}` ended well, but the file it should have left is not there.",
        "zh": "`{client}` 正常结束，但没有留下应有的文件。",
    },
    "corpora.changed": {
        "en": "{path} is not the file that was expected (sha256 {found}..., not {expected}...); remove it and fetch again.",
        "zh": "{path} 不是预期的文件（sha256 为 {found}…，应为 {expected}…）；请删除后重新获取。",
    },
}
