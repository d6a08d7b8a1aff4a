"""`python -m peft_run.ui.keeper FOLDER`: runs the command of a job, and notes in its folder how it went.

It has a session of its own, so that neither the page's end nor a closed terminal ends the command; and it imports
nothing but the standard library, because it stays in memory as long as the command runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ASKED, BEGAN, ENDED = "asked.json", "began.json", "ended.json"
OUT, LOG = "out.txt", "log.txt"


def main(folder: Path) -> int:
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    # A page that was started in the background of a script ignores Ctrl-C, and its children would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(folder / OUT, "wb") as out, open(folder / LOG, "wb") as log:
        child = subprocess.Popen(
            asked["words"],
            cwd=asked["cwd"],
            env={**os.environ, **asked["environment"]},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
        )
    note(folder / BEGAN, {"pid": child.pid, "keeper": os.getpid(), "began": time.time()})
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:  # meant for the command
            child.send_signal(signal.SIGINT)
    note(folder / ENDED, {"code": code, "ended": time.time()})
    return 0


def note(path: Path, values: dict) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(values), encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
