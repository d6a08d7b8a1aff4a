"""The second environment: upstream's release next to exactly our torch and transformers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

VERSION = "0.21.2"
ENVIRONMENT = Path(__file__).with_name(".venv-upstream")


def python() -> str:
    """The environment's interpreter; makes the environment when it is not there."""
    interpreter = ENVIRONMENT / "bin" / "python"
    if not interpreter.exists() or subprocess.run([interpreter, "-c", "import peft"], capture_output=True).returncode:
        make(interpreter)
    return str(interpreter)


def make(interpreter: Path) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")}
    wanted = [f"{name}=={version.split('+')[0]}" for name, version in versions.items()]
    print(f"making {ENVIRONMENT} with peft=={VERSION} {' '.join(wanted)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", f"peft=={VERSION}", *wanted], check=True)
