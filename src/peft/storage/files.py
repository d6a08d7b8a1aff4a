"""Write several files of one folder as one step: after a crash, all of them are old or all are new.

    1. everything is written and flushed inside `<folder>/.peft-save-<id>/`
    2. that folder is renamed to `<folder>/.peft-commit/`: this is the moment the save happens
    3. its files are moved over the old ones

A crash before 2 leaves the old files; after 2, `settle` (run before each read and save) finishes step 3.
"""

import contextlib
import json
import os
import shutil
import time
import uuid

from peft.errors import CheckpointError

COMMIT, STAGING = ".peft-commit", ".peft-save-"
MAX_JSON_BYTES = 1 << 20  # a real config has a few KB; a file that claims more is an attack or a mistake
ABANDONED_AFTER = 3600  # seconds: a staging folder this old belongs to a save that died


def commit_files(folder, files):
    """Write {relative name: bytes} into a folder, together or not at all, and drop what a dead save left.

    A value may be a list of byte chunks, written one after the other. Raises CheckpointError naming the path and
    the bytes needed where the disk refuses.
    """
    folder = os.fspath(folder)
    staging = os.path.join(folder, f"{STAGING}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        os.makedirs(folder, exist_ok=True)
        settle(folder)
        _drop_abandoned(folder)
        os.mkdir(staging)
        for name, content in files.items():
            path = os.path.join(staging, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                for chunk in content if isinstance(content, list) else [content]:
                    f.write(chunk)
                f.flush()
                os.fsync(f.fileno())
        flush(staging)
        while True:
            try:
                os.rename(staging, os.path.join(folder, COMMIT))
                break
            except OSError:
                if not os.path.isdir(os.path.join(folder, COMMIT)):
                    raise
                settle(folder)  # another process committed in between
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        size = sum(len(c) for v in files.values() for c in (v if isinstance(v, list) else [v]))
        raise CheckpointError(
            f"Saving to {folder} failed: {error}. It needs {size:,} free bytes; what was there before is unchanged."
        ) from error
    try:
        try:
            settle(folder)
        except OSError:
            settle(folder)  # the save has happened and only renames are left: worth a second try
    except OSError as error:
        raise CheckpointError(
            f"What was saved to {folder} is whole but could not be moved into place: {error}. The next load or save of "
            "this folder does so; programs other than this one may see old files until then."
        ) from error
    flush(folder)


def settle(folder):
    """Finish a save that was committed but not yet moved into place. Harmless to call at any time."""
    commit = os.path.join(folder, COMMIT)
    if not os.path.isdir(commit):
        return
    for root, _, names in os.walk(commit):
        target = os.path.join(folder, os.path.relpath(root, commit))
        os.makedirs(target, exist_ok=True)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process may be settling too
                os.replace(os.path.join(root, name), os.path.join(target, name))
    for root, _, _ in os.walk(commit, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(root)


def _drop_abandoned(folder):
    for entry in os.scandir(folder):
        if entry.name.startswith(STAGING) and _dead(entry):
            shutil.rmtree(entry.path, ignore_errors=True)


def _dead(entry):
    """Whether the process that made a staging folder is gone."""
    try:
        os.kill(int(entry.name[len(STAGING) :].partition("-")[0]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError):
        pass
    with contextlib.suppress(OSError):
        return time.time() - entry.stat().st_mtime > ABANDONED_AFTER
    return False


def flush(path):
    """Down to the disk, so that a rename cannot overtake what it makes visible."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_json(path, limit=MAX_JSON_BYTES):
    """The dict in a JSON config file. Raises CheckpointError, naming the file, where it is not one."""
    try:
        if limit is not None and os.path.getsize(path) > limit:
            raise CheckpointError(f"{path} is larger than {limit} bytes: that is no adapter config.")
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Save the adapter again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(data).__name__}.")
    return data
