"""The weights of a base model in its safetensors files, one tensor or one file at a time."""

import os
from pathlib import Path

from peft.errors import CheckpointError
from peft.storage.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


class Shards:
    """A checkpoint folder, one safetensors file, or a hub repository, which is downloaded if need be.

    files {file name: the keys of its tensors}, from the files' own headers
    """

    def __init__(self, source, **hub_options):
        self.source, file = os.fspath(source), os.path.isfile(source)
        where = os.path.dirname(self.source) if file else self.source
        self.folder = Path(where) if os.path.isdir(where or ".") else _download(self.source, hub_options)
        self.files = {}
        for name in [os.path.basename(self.source)] if file else self._names():
            with self.open(name) as file:
                self.files[name] = list(file.keys())
        self.file_of = {key: name for name, keys in self.files.items() for key in keys}

    def _names(self):
        if (self.folder / INDEX).is_file():
            return sorted(set(read_json(self.folder / INDEX, limit=None).get("weight_map", {}).values()))
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if found := sorted(p.name for p in self.folder.glob("*.safetensors") if not p.name.startswith("adapter_")):
            return found
        raise CheckpointError(
            f"{self.source} holds no weights as safetensors. Load it with transformers and save it again to convert it."
        )

    def open(self, name):
        """The safetensors file of that name, to be used in a `with`."""
        from safetensors import SafetensorError, safe_open

        if os.path.basename(name) != name:
            raise CheckpointError(f"{self.source}: the index names {name!r}, which is outside of the folder.")
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder / name} cannot be read: {error}. Download or save it again."
            ) from error

    def read(self, key):
        """One tensor."""
        with self.open(self.file_of[key]) as file:
            return file.get_tensor(key)

    def named(self, names, prefix=""):
        """{name: key in the files} for names of a model's tensors, whose own prefix files may have or lack.

        Raises CheckpointError for names that are in no file.
        """
        ways = (lambda n: n, lambda n: n.removeprefix(f"{prefix}."), lambda n: f"{prefix}.{n}")
        found = max(({n: way(n) for n in names if way(n) in self.file_of} for way in ways), key=len)
        if missing := [n for n in names if n not in found]:
            raise CheckpointError(
                f"{self.source} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. It must be "
                "the model that the quantized base was made from, with the same architecture."
            )
        return found

    def other_files(self):
        """Paths of the folder's files that hold no weights: configs, tokenizer, code."""
        skipped = (*WEIGHTS, INDEX)
        return [p for p in sorted(self.folder.iterdir()) if p.is_file() and not p.name.endswith(skipped)]


def _download(repo_id, options):
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))
    except Exception as error:  # its own errors, of the network and of the file system
        raise CheckpointError(
            f"{repo_id!r} is no folder, and it cannot be had from the hub: {error}. Give the folder with the original "
            "model's safetensors files."
        ) from error
