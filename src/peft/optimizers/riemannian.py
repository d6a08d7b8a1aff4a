"""Riemannian preconditioning: gradients of A and B rescaled by each other's Gram matrix (arXiv 2402.02347)."""

import inspect

import torch
from torch.optim import Optimizer

from peft.errors import ConfigError
from peft.optimizers.pairs import factor_pairs


def create_riemannian_optimizer(model, optimizer_cls, *, lr, reg=1e-2, **kwargs):
    """An `optimizer_cls` whose step first makes gA := (BᵀB + reg·I)⁻¹·gA and gB := gB·(A·Aᵀ + reg·I)⁻¹.

    reg: keeps the inverses bounded. kwargs go to the optimizer. Raises TypeError for what is no optimizer, ValueError
    for a model without trained factors and for optimizers that evaluate the loss within a step.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients anew within a step, past the "
            "preconditioner. Use an optimizer without one, for example AdamW or SGD."
        )
    pairs = [(A, B) for _, A, B in factor_pairs(model.named_parameters()) if A.requires_grad and B.requires_grad]
    if not pairs:
        raise ConfigError(
            "The model did not bring any trainable lora_A/lora_B pairs, so there is nothing to precondition."
        )

    class Riemannian(optimizer_cls):
        @torch.no_grad()
        def step(self, closure=None):
            if closure is not None:
                raise ConfigError("This optimizer does not support closures: they would overwrite the gradients.")
            precondition(pairs, reg)
            return super().step()

    return Riemannian([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


@torch.no_grad()
def precondition(pairs, reg):
    """Rescale the gradients of the pairs (A, B) in place, computing in float32 or better."""
    for A, B in pairs:
        dtype = torch.promote_types(A.dtype, torch.float32)
        a, b = A.detach().to(dtype), B.detach().to(dtype)
        if A.grad is not None:
            A.grad.copy_(torch.linalg.solve(damped(b.t() @ b, reg), A.grad.to(dtype)))
        if B.grad is not None:
            B.grad.copy_(torch.linalg.solve(damped(a @ a.t(), reg), B.grad.to(dtype).t()).t())


def damped(gram, reg):
    gram.diagonal().add_(reg)
    return gram
