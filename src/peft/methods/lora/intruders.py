"""Take intruder dimensions out of a trained LoRA: directions that the base model does not have (arXiv 2410.21228)."""

import copy

import torch

from peft.errors import AdapterError


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model,
    old_adapter_name="default",
    new_adapter_name="intruder_reduced",
    top_k=10,
    threshold_epsilon=0.5,
    mitigation_lambda=0.75,
    logging_sink=print,
):
    """Make an adapter like `old_adapter_name` but with weaker intruders, and activate it: forgets less, fits less.

    top_k: look at that many leading singular directions of each adapted weight. threshold_epsilon: one whose cosine
    with every direction of the base weight is below this is an intruder. mitigation_lambda: 0 takes an intruder away,
    1 leaves it. logging_sink: called with a line for each layer; None: nothing is said.
    Raises ValueError for other methods than LoRA.
    """
    say = logging_sink or (lambda line: None)
    if peft_model.peft_type != "LORA":
        raise AdapterError(f"Intruder dimensions can be reduced in LoRA adapters only; this is {peft_model.peft_type}.")
    peft_model.add_adapter(new_adapter_name, copy.deepcopy(peft_model.peft_config[old_adapter_name]))
    for path, layer in peft_model.base_model.layers.items():
        if old_adapter_name not in layer.adapters:
            continue
        old, new = layer.adapters[old_adapter_name], layer.adapters[new_adapter_name]
        W = layer.kind.uncanon(layer.base_weight()).float()
        delta = layer.get_delta_weight(old_adapter_name)
        U_base = torch.linalg.svd(W, full_matrices=False)[0]
        U, S, V = torch.linalg.svd(W + delta, full_matrices=False)
        nearest = (U[:, :top_k].T @ U_base).abs().amax(dim=1)
        found = (nearest < threshold_epsilon).nonzero().flatten()
        say(f"{path}: {len(found)} intruders" if len(found) else f"{path}: no intruders")
        factors = old.factors()
        if len(found):
            less = (mitigation_lambda - 1) * (U[:, found] * S[found]) @ V[found]
            factors = best_factors(layer.kind.canon(delta + less) / old.scaling, old.r)
        for place, value in zip(new.factors(), factors):
            place.copy_(value)
    peft_model.set_adapter(new_adapter_name)


def best_factors(delta, r):
    """(A, B) of rank r nearest to `delta` (out, in), of equal size."""
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * V[:r], U[:, :r] * root
