"""An adapter's files, described: what it changes, its size, its base, and the norm of what it holds in each module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft_run.errors import UsageError


def report(path: str | os.PathLike) -> dict[str, Any]:
    """Raises UsageError where the folder has no adapter; the library's errors where a file is damaged."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from peft import PeftConfig, load_peft_weights

    folder = find(Path(path))
    config = PeftConfig.from_pretrained(str(folder))
    tensors = load_peft_weights(str(folder))
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    modules: dict[str, dict[str, Any]] = {}
    for key, tensor in sorted(tensors.items()):
        parts = key.removeprefix("base_model.model.").split(".")
        own = next((i for i, part in enumerate(parts) if prefix and part.startswith(prefix)), len(parts) - 1)
        name = ".".join(parts[:own]) or parts[0]
        row = modules.setdefault(name, {"module": name, "numbers": 0, "norm": 0.0})
        row["numbers"] += tensor.numel()
        row["norm"] = (row["norm"] ** 2 + tensor.float().norm().item() ** 2) ** 0.5
    fields = ("r", "lora_alpha", "use_rslora", "use_dora", "num_virtual_tokens", "reduction_factor", "bias")
    return {
        "folder": str(folder),
        "method": config.peft_type.value,
        "task": getattr(config.task_type, "value", config.task_type),
        "base": config.base_model_name_or_path,
        "settings": {name: value for name in fields if (value := getattr(config, name, None)) not in (None, False)},
        "numbers": sum(t.numel() for t in tensors.values()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "finite": all(bool(t.isfinite().all()) for t in tensors.values()),
        "modules": list(modules.values()),
    }


def find(path: Path) -> Path:
    if (path / "adapter_config.json").is_file():
        return path
    from peft_run.run import Run

    run = Run.open(path)
    if not (run / "adapter_config.json").is_file():
        raise UsageError("deploy.no_adapter", path=path)
    return run.path
