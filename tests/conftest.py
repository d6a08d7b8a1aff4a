"""Settings for all tests: no network, and distribution metadata for an uninstalled source tree."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads that wait for each other cost a hundredfold

HERE = Path(__file__).parent
sys.path[:0] = [p for p in map(str, (HERE, HERE / "fixtures", HERE / "laws")) if p not in sys.path]


def _announce_source_tree() -> None:
    """Transformers, diffusers and accelerate ask the metadata of `peft`: give a PYTHONPATH checkout some."""
    try:
        importlib.metadata.version("peft")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    source = HERE.parent / "src"
    scope: dict[str, str] = {}
    exec((source / "peft" / "version.py").read_text(), scope)
    folder = Path(tempfile.mkdtemp(prefix="peft-metadata-"))
    info = folder / f"peft-{scope['__version__']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {scope['__version__']}\n")
    paths = [str(folder), str(source)]
    sys.path[:0] = [p for p in paths if p not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


_announce_source_tree()
