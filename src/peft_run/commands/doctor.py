"""`peft doctor`."""

from __future__ import annotations

import argparse

HELP = {"en": "what this machine and installation can do", "zh": "检查本机环境与已安装的组件"}
EXTRAS = {
    "run": ("transformers", "accelerate", "pydantic", "yaml", "gguf", "rich"),
    "quant": ("bitsandbytes",),
    "serve": ("fastapi", "uvicorn"),
    "ui": ("gradio",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json

    found = checks()
    if args.json:
        print_json(found)
        return 0
    for name, value in found.items():
        print(f"{name:<14}{value if not isinstance(value, dict) else ', '.join(f'{k} {v}' for k, v in value.items())}")
    return 0


def checks() -> dict:
    import importlib.util
    import os
    import shutil

    import torch

    from peft_run.environment import versions
    from peft_run.models import cache_dir
    from peft_run.precision import fastest_precision

    missing = {extra: [p for p in names if importlib.util.find_spec(p) is None] for extra, names in EXTRAS.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "packages": versions(),
        "extras": {extra: "ready" if not names else f"lacks {' '.join(names)}" for extra, names in missing.items()},
        "cpus": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": gpus or "none",
        "cpu_format": str(fastest_precision().dtype).removeprefix("torch."),
        "disk_free_gb": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
        "cache": str(cache_dir()),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }
