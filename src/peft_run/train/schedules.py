"""Methods that do something of their own in every step: AdaLoRA's and AdaMSS's budgets, AdaLoRA's orthogonality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "schedule|"  # of their tensors in a checkpoint


def tuner_of(model: nn.Module) -> Any:
    return model.base_model if hasattr(model, "peft_config") else None


def penalty(model: nn.Module) -> torch.Tensor | None:
    """What the method adds to the loss of a step."""
    tuner = tuner_of(model)
    if not hasattr(type(tuner), "orthogonality"):
        return None
    weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
    return weight * tuner.orthogonality() if weight else None


def after_step(model: nn.Module, step: int) -> None:
    """Between the optimizer's step and the end of the gradients."""
    tuner = tuner_of(model)
    if hasattr(type(tuner), "update_and_allocate"):
        tuner.update_and_allocate(step)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    tuner = tuner_of(model)
    state = tuner.schedule_state() if hasattr(type(tuner), "schedule_state") else {}
    return {PREFIX + name: tensor for name, tensor in state.items()}


def restore(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse, from all tensors of a checkpoint."""
    device = next(model.parameters()).device
    own = {name[len(PREFIX) :]: t.to(device) for name, t in tensors.items() if name.startswith(PREFIX)}
    if own:
        tuner_of(model).load_schedule_state(own)
