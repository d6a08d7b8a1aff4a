"""Write adapters to disk: weights, config, model card and provenance together, or not at all."""

import dataclasses
import os

import torch

from peft.card import model_card
from peft.config import CONFIG_NAME
from peft.core.checkpoint import get_peft_model_state_dict
from peft.errors import CheckpointError
from peft.storage import hub, provenance
from peft.storage.files import commit_files
from peft.weights import serialised


def save_pretrained(
    model,
    save_directory,
    safe_serialization=True,
    selected_adapters=None,
    save_embedding_layers="auto",
    is_main_process=True,
    state_dict=None,
    path_initial_model_for_weight_conversion=None,
    push_to_hub=False,
    **kwargs,
):
    """Write the adapters of a model into a folder: "default" at its root, others each in a subfolder of their name.

    safe_serialization: safetensors (else a pickle). selected_adapters: which ones, default all. state_dict: take the
    values from this one, gathered from a sharded model. is_main_process: False writes nothing.
    path_initial_model_for_weight_conversion: given, a LoRA that subtracts its start (pissa, olora, corda, lora_ga) is
    written as a plain one of twice the rank; the path itself is not read, for the start is known here.
    Raises ValueError for unknown adapters, CheckpointError, naming tensor or path, where nothing sound can be written.
    """
    if os.path.isfile(save_directory):
        raise ValueError(f"{save_directory} is a file; save_pretrained needs a folder.")
    chosen = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    if unknown := [n for n in chosen if n not in model.peft_config]:
        raise ValueError(f"selected_adapters names unknown adapters {unknown}; there are {list(model.peft_config)}.")
    if not is_main_process:
        return
    base = model.get_base_model()
    for name in chosen:
        folder = save_directory if name == "default" else os.path.join(save_directory, name)
        tensors = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
        )
        tensors = {k: _whole(k, t, name) for k, t in tensors.items()}
        config = _config_for_file(model, base, name)
        if not model._is_prompt_learning:
            plain = path_initial_model_for_weight_conversion is not None
            tensors, config = model.base_model.file_form(name, tensors, config, plain)
        files = dict([serialised(tensors, safe_serialization)])
        files[CONFIG_NAME] = config.to_json().encode()
        files[provenance.FILE_NAME] = provenance.describe(
            base, {} if model._is_prompt_learning else model.base_model.layers, name
        )
        if name == "default" or len(chosen) == 1:
            files["README.md"] = model_card(model, folder)
        commit_files(folder, files)
    if push_to_hub:
        hub.upload_folder(save_directory, kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)


def _whole(key, tensor, adapter_name):
    """A tensor as it can be written. Raises CheckpointError for one that is not really here."""
    if hasattr(tensor, "full_tensor"):  # a DTensor: gather its shards
        tensor = tensor.full_tensor()
    sharded = tensor.shape == (0,) and torch.distributed.is_available() and torch.distributed.is_initialized()
    if tensor.is_meta or sharded:  # ZeRO leaves such tensors of what another process holds
        raise CheckpointError(
            f"Adapter {adapter_name!r} cannot be saved: {key} holds no values on this process: it is on the meta "
            "device or sharded away. Save after loading, or gather the state_dict first and pass it as state_dict=."
        )
    return tensor.detach()


def _config_for_file(model, base, name):
    config = dataclasses.replace(model.peft_config[name])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config
