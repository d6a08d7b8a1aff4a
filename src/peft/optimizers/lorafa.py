"""LoRA-FA: A stays frozen, and B follows the gradient of the full weight as well as it can (arXiv 2308.03303)."""

import math

import torch
from torch.optim import Optimizer

from peft.errors import ConfigError
from peft.optimizers.pairs import factor_pairs

DAMPING = 1e-8  # keeps A·Aᵀ invertible


class LoraFAOptimizer(Optimizer):
    """AdamW in which the gradient of each B is first made (1/s²)·g·(A·Aᵀ)⁻¹.

    A parameter group holds `params` with their `names` and `scaling_factors`, s for each parameter of LoRA. Decay is
    decoupled. correct_bias: Adam's correction of the first steps.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        for name, value, fine in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= b < 1 for b in betas)),
            ("eps", eps, eps >= 0),
        ):
            if not fine:
                raise ConfigError(f"LoraFAOptimizer: {name} is out of range: {value!r}.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step. closure: computes the loss anew, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = {id(B): A for _, A, B in factor_pairs(zip(group["names"], group["params"]))}
            for p, s in zip(group["params"], group["scaling_factors"]):
                if p.grad is None:
                    continue
                A = pairs.get(id(p))
                self._adam(group, p, p.grad if A is None else projected(p.grad, A, s))
        return loss

    def _adam(self, group, p, g):
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def projected(g, A, s):
    """The gradient g (out, r) of B that moves s·BA most nearly along the full weight's gradient; A (r, in)."""
    A32 = A.float()
    gram = A32 @ A32.t()
    gram.diagonal().add_(DAMPING)
    return (torch.linalg.solve(gram, g.float().t()).t() / s**2).to(g.dtype)


def create_lorafa_optimizer(model, r, lora_alpha, lr, weight_decay=0.0, use_rslora=None):
    """Freeze every A of a model's adapters, and make a `LoraFAOptimizer` for the rest.

    r, lora_alpha: as in the config. use_rslora: as in the config, checked if given; ValueError where it differs.
    """
    configs = {name: model.peft_config[name] for name in model.active_adapters}
    flags = {bool(getattr(c, "use_rslora", False)) for c in configs.values()}
    if use_rslora is not None and flags != {use_rslora}:
        raise ConfigError(f"use_rslora={use_rslora}, but the adapters {list(configs)} were made with {sorted(flags)}.")
    scalings = {}
    for layer in model.base_model.layers.values():
        for adapter in layer.adapters.values():
            s = layer.scaling.get(adapter.name) if "scaling" in layer.__dict__ else None
            scalings |= {id(p): s for p in adapter.parameters(frozen=True)}
    named = list(model.named_parameters())
    for name, p in named:
        if ".lora_A." in name:
            p.requires_grad_(False)
    group = {
        "params": [p for _, p in named],
        "names": [n for n, _ in named],
        "scaling_factors": [scalings.get(id(p)) for _, p in named],
        "scaling_factor": lora_alpha / (math.sqrt(r) if flags == {True} else r),
    }
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)
