"""Merging several updates of one weight into one: task arithmetic, TIES (arXiv 2306.01708), DARE (arXiv 2311.03099).

Task tensors are updates of the same shape, one per adapter; weights (tasks,) say how much each counts.
"""

import warnings

import torch


def reshape_weight_task_tensors(task_tensors, weights):
    """weights (tasks,), shaped to broadcast against task_tensors (tasks, ...)."""
    return weights.view(weights.shape + (1,) * (task_tensors.ndim - weights.ndim))


def magnitude_based_pruning(tensor, density):
    """Keep the int(density · numel) entries of largest magnitude, zero the rest."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def random_pruning(tensor, density, rescale):
    """Keep each entry with probability `density`; rescale: divide what is left by it, so that the mean stays."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(tensor, density, method, rescale=False):
    """Keep about `density` of the entries, chosen by `method`: "magnitude" or "random".

    Raises ValueError for a negative density or an unknown method.
    """
    if density >= 1:
        warnings.warn(f"density={density} keeps everything: nothing is pruned.", stacklevel=2)
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise ValueError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor, method="total"):
    """Which entries of (tasks, ...) have the sign elected for their place; no entry that is 0 has it.

    method: "total" elects by the sum of the values, "frequency" by the number of tasks; a draw elects plus.
    Raises RuntimeError for another method.
    """
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    signs = tensor.sign()
    votes = tensor.sum(0) if method == "total" else signs.sum(0)
    return signs == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors, majority_sign_mask):
    """The mean, place by place, of the tasks that the mask lets through; 0 where it lets none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1.0)


def task_arithmetic(task_tensors, weights):
    """The weighted sum."""
    tensors = torch.stack(list(task_tensors))
    return (tensors * reshape_weight_task_tensors(tensors, weights)).sum(0)


def magnitude_prune(task_tensors, weights, density):
    """The weighted sum of each task's largest entries."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(task_tensors, weights, density, majority_sign_method="total"):
    """TIES: each task's largest entries, the sign most of them have, the weighted mean of those that have it."""
    return _elect([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors, weights, density):
    """DARE: the weighted sum of each task's randomly thinned and rescaled entries."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def dare_ties(task_tensors, weights, density, majority_sign_method="total"):
    """DARE's thinned entries, merged as TIES does."""
    return _elect([prune(t, density, "random", rescale=True) for t in task_tensors], weights, majority_sign_method)


def _elect(pruned, weights, majority_sign_method):
    pruned = torch.stack(pruned)
    mask = calculate_majority_sign_mask(pruned, majority_sign_method)
    return disjoint_merge(pruned * reshape_weight_task_tensors(pruned, weights), mask)
