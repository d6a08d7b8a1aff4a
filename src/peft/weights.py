"""The tensors of an adapter: read from a folder or the hub, and as the bytes of a file."""

import io
import os
import re

import torch

from peft.core.checkpoint import PREFIX
from peft.errors import CheckpointError
from peft.storage import hub

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 8 << 20  # a header this large lists more tensors than any adapter has


def infer_device():
    """The accelerator of this machine as a device name, or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "cpu"


def load_peft_weights(model_id, device=None, key_mapping=None, use_safetensors=None, **kwargs):
    """{file key: tensor} of an adapter. CPU tensors are mapped from the file, not copied.

    key_mapping: {regex: replacement} applied to each key below `base_model.model.`. use_safetensors=True refuses
    pickled files; they are read with weights_only=True in any case. kwargs: hub options, `subfolder` among them.
    Raises ValueError where there is no file, CheckpointError where it is damaged.
    """
    options, _ = hub.split_options(kwargs)
    subfolder = options.pop("subfolder", None)
    path = hub.find_file(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options)
    if path is not None:
        tensors = read_safetensors(path, device or "cpu")
    else:
        path = None if use_safetensors else hub.find_file(model_id, WEIGHTS_NAME, subfolder=subfolder, **options)
        if path is None:
            raise ValueError(
                f"Can't find weights at {model_id}{f'/{subfolder}' if subfolder else ''}: there is neither "
                f"{SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}, on disk or on the hub."
            )
        tensors = read_pickle(path, device or "cpu")
    return rename(tensors, key_mapping) if key_mapping else tensors


def read_safetensors(path, device="cpu"):
    """{key: tensor} of a safetensors file. Raises CheckpointError, naming the file, where it is damaged."""
    from safetensors import SafetensorError, safe_open

    size = os.path.getsize(path)
    with open(path, "rb") as f:
        header = int.from_bytes(f.read(8), "little")
    if header > MAX_HEADER_BYTES or header + 8 > size:
        raise CheckpointError(f"{path} is damaged or cut off: its header claims {header:,} of {size:,} bytes.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Save or download the adapter again.") from error


def read_pickle(path, device):
    """{key: tensor} of a pickled file. Raises CheckpointError, naming the file, where it is damaged or holds code."""
    try:
        tensors = torch_load(path, map_location=device)
    except Exception as error:  # the unpickler raises whatever a hostile file makes it raise
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}. A pickled adapter may hold tensors only."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in tensors.items()
    ):
        raise CheckpointError(f"{path} must hold a dict of tensors by name, found {type(tensors).__name__}.")
    return tensors


def torch_load(path, *args, **kwargs):
    """torch.load of a file from anywhere: only tensors and plain values, never code."""
    kwargs["weights_only"] = True
    return torch.load(path, *args, **kwargs)


def serialised(tensors, safe=True):
    """(name, bytes) of a file that holds {key: tensor}: safetensors, or with safe=False a pickle."""
    if not safe:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        return WEIGHTS_NAME, buffer.getvalue()
    from safetensors.torch import save

    return SAFETENSORS_WEIGHTS_NAME, save(_unshared(tensors), metadata={"format": "pt"})


def _unshared(tensors):
    """Contiguous tensors, no two of which share memory, as safetensors wants them."""
    seen, result = set(), {}
    for key, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.device)
        tensor = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
        result[key] = tensor.contiguous()
    return result


def rename(tensors, key_mapping):
    """The tensors under keys changed by {regex: replacement}, tried in order, the first match counts."""
    renamed = {}
    for key, value in tensors.items():
        inner = key.removeprefix(PREFIX)
        for pattern, replacement in key_mapping.items():
            replacement = re.sub(r"\(.*\)", "", replacement.lstrip("^"))  # some maps hold a pattern on this side too
            new, count = re.subn(pattern, replacement, inner)
            if count:
                inner = new
                break
        renamed[PREFIX + inner if key.startswith(PREFIX) else inner] = value
    return renamed
