"""What sharded training needs to know: which modules FSDP wraps, and how ZeRO-3 gathers a parameter."""

import contextlib
import functools
import os
import sys

from torch import nn

from peft import registry


def _get_no_split_modules(model):
    """Class names of modules that belong on one device, as the model's parts declare them."""
    names = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def fsdp_auto_wrap_policy(model):
    """An FSDP wrapping policy: one unit for each transformer layer and for each trained leaf.

    FSDP flattens a unit's parameters into one tensor, so frozen and trained ones must not share a unit. The layer
    classes are those in FSDP_TRANSFORMER_CLS_TO_WRAP, else what the model declares. Raises TypeError for a class that
    the model does not have.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    asked = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = {n.strip() for n in asked.split(",")} if asked else _get_no_split_modules(model)
    classes = {type(m).__name__: type(m) for m in model.modules() if type(m).__name__ in names}
    if missing := sorted(names - set(classes)):
        raise TypeError(f"Could not find the transformer layer class to wrap in the model: {', '.join(missing)}.")
    encoders = {m.encoder for m in registry.loaded() if m.encoder is not None}
    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={*classes.values(), *encoders}),
        ],
    )


def _is_trained_leaf(module: nn.Module):
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad


def check_deepspeed_zero3_enabled():
    """Whether transformers runs under DeepSpeed ZeRO stage 3."""
    if "deepspeed" not in sys.modules or "transformers" not in sys.modules:
        return False
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def gather_params_ctx(param, modifier_rank=0, fwd_module=None):
    """While inside, parameters that ZeRO-3 has partitioned are whole; modifier_rank's changes are kept."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield
