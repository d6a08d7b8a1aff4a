"""What a call of a model shows before it runs."""

import torch

from peft.core.layer import AdapterLayer


def is_checkpointing(model):
    """Whether some part of a model recomputes its activations (transformers' flag)."""
    stack = [model]
    while stack:
        module = stack.pop()
        if module.__dict__.get("gradient_checkpointing", False):
            return True
        if isinstance(module, AdapterLayer):
            stack.append(module._modules["base_layer"])
        else:  # a copy: another thread may be loading an adapter
            stack += [m for m in list(module._modules.values()) if m is not None]
    return False


def batch_size(args, kwargs):
    """Number of samples in a forward's arguments, or None where it cannot be told."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "inputs"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name].shape[0]
    tensors = [v for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor) and v.ndim]
    return tensors[0].shape[0] if tensors else None
