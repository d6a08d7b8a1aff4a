"""How far adapters of the `adapters` library (AdapterHub) are from what they compute there, when they are loaded here.

    python benchmarks/adapters_interop.py --adapters-python PATH

PATH is an interpreter with `adapters==1.3.0`, which makes the adapters and their outputs in every architecture and
config of tests/fixtures/adapters_lib.py. A cell is the largest difference over the largest output, in float32; a star
marks a model that enlarges rounding, where ours is as near to float64 arithmetic as theirs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
sys.path[:0] = [str(Path(__file__).parent.parent / "src"), str(FIXTURES)]


def main() -> int:
    """Print the table; 1 if an adapter that can be placed is further off than rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters-python", required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    sizes = ["--width", str(options.width), "--layers", str(options.layers)]
    with tempfile.TemporaryDirectory() as folder:
        maker = [options.adapters_python, "-W", "ignore", str(FIXTURES / "make_adapters_lib.py")]
        subprocess.run([*maker, "--folder", f"{folder}/made", "--all", *sizes], check=True, stderr=subprocess.DEVNULL)
        return report(Path(folder) / "made", options.width, options.layers)


def report(folder: Path, width: int, layers: int) -> int:
    """Compare all adapters in a folder."""
    import adapters_lib

    names = [*adapters_lib.CONFIGS, *adapters_lib.RARER]
    print(f"Width {width}, {layers} layers: largest difference / largest output\n")
    print(
        "| config | " + " | ".join(adapters_lib.ARCHITECTURES) + " |\n|---|" + "---|" * len(adapters_lib.ARCHITECTURES)
    )
    failed = False
    for name in names:
        cells = []
        for architecture in adapters_lib.ARCHITECTURES:
            gap, wide = difference(folder, architecture, name, width, layers)
            failed |= gap is not None and gap > 1e-5 and not wide
            cells.append("refused" if gap is None else f"{gap:.0e}" + "*" * wide)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return int(failed)


def difference(folder: Path, architecture: str, name: str, width: int, layers: int) -> tuple[float | None, bool]:
    """(largest difference over the largest output or None where the settings are refused, whether it is a star)."""
    import adapters_lib
    from safetensors.torch import load_file

    from peft.errors import CheckpointError
    from peft.integrations.adapters_library import load_adapters_checkpoint

    wanted = load_file(folder / architecture / "expected.safetensors")[name]
    base = adapters_lib.make_base(architecture, width, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = load_adapters_checkpoint(base, folder / architecture / name)
        except CheckpointError:
            return None, False
    found, size = adapters_lib.run(model, architecture), wanted.abs().max()
    gap = float((found - wanted).abs().max() / size)
    if gap <= 1e-5:
        return gap, False
    exact = adapters_lib.run(model.double(), architecture)
    return gap, bool((found - exact).abs().max() <= 1.25 * (wanted - exact).abs().max())


if __name__ == "__main__":
    sys.exit(main())
