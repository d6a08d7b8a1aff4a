"""How much memory there is: what a person allows, what a GPU has free, what a machine and its container have left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peft_run.errors import UsageError

if TYPE_CHECKING:
    import torch

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)
CGROUPS = (  # a container's limit, its use, and what of that are cached files; second version and first
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
GPU_CONTEXT = 512 << 20  # what CUDA takes of a GPU for itself


def size_of(text: str) -> int:
    """Bytes of "7GiB", "500 MB" or "80G". Raises UsageError for anything else."""
    found = SIZE.fullmatch(text)
    if found is None or found[2].upper() not in UNITS:
        raise UsageError("plan.no_size", text=text)
    return int(float(found[1]) * UNITS[found[2].upper()])


def shown(size: float) -> str:
    """1536 MiB as "1.50 GiB"."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def room(device: torch.device, allowed: str | None) -> int:
    """Bytes that a training on the device may add to what this process has now."""
    import torch

    if device.type == "cuda":
        return size_of(allowed) - GPU_CONTEXT if allowed else torch.cuda.mem_get_info(device)[0]
    return size_of(allowed) - resident() if allowed else available()


def available() -> int:
    """Bytes of main memory that are free or can be made free, for this machine or the container that this is in."""
    found = [size for group in CGROUPS if (size := left_in(*group)) is not None]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):  # no Linux
        import psutil

        found.append(psutil.virtual_memory().available)
    return min(found)


def left_in(folder: str | Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes that a container may still take, or None where it has no limit. Cached files give way to a program."""
    try:
        most, now = ((Path(folder) / name).read_text().strip() for name in (limit, used))
    except OSError:
        return None
    if most == "max":
        return None
    try:
        parts = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
    except OSError:
        parts = {}
    return max(0, int(most) - int(now) + int(parts.get(cached, 0)))


def resident() -> int:
    """Bytes of main memory that this process has now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except OSError:  # no Linux
        import psutil

        return psutil.Process().memory_info().rss
