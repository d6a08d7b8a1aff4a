"""What is said about run folders."""

TABLE = {
    "run.none": {
        "en": "{path} is no run: it has no config.yaml and no `latest`.",
        "zh": "{path} 不是一次运行：其中没有 config.yaml，也没有 `latest`。",
    },
    "run.broken_file": {"en": "{file} cannot be read: {problem}", "zh": "无法读取 {file}：{problem}"},
    "run.busy": {
        "en": "another process is working on {path}; wait for it, or stop it.",
        "zh": "另一个进程正在使用 {path}；请等待它结束，或先停止它。",
    },
}
