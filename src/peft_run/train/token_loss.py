"""Cross-entropy of single tokens from hidden states, chunk by chunk: the logits of a whole batch never exist.

For a frozen output layer the gradient of each token's loss with respect to its hidden state is computed in the
forward, (softmax - one_hot) W, while the chunk's logits are there. The backward only scales it, so the output layer is
multiplied twice in all, not three times as when logits are computed again.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 << 20  # of float32 logits at a time: a GPU is slow on small products
CHUNK_BYTES_CPU = 16 << 20
FEWEST = 16  # rows of a chunk, however large the vocabulary


def token_losses(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """hidden (tokens, width), targets (tokens,) -> (tokens,) float32, differentiable in hidden and in the head."""
    if is_frozen_linear(head):
        return FrozenHead.apply(hidden, targets, head)
    # An adapted or trained head: its own gradients are needed, so its chunks are computed again in the backward.
    rows = chunk_rows(out_features(head, hidden), hidden)
    parts = [
        checkpoint(loss_of_chunk, part, wanted, head, use_reentrant=False)
        for part, wanted in zip(hidden.split(rows), targets.split(rows))
    ]
    return torch.cat(parts)


def count_right(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> int:
    """How many tokens are the likeliest one."""
    rows = chunk_rows(out_features(head, hidden), hidden)
    return sum(int((head(h).argmax(-1) == t).sum()) for h, t in zip(hidden.split(rows), targets.split(rows)))


def loss_of_chunk(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def is_frozen_linear(head: nn.Module) -> bool:
    if not isinstance(head, nn.Linear) or has_hooks(head) or any(p.requires_grad for p in head.parameters()):
        return False
    return type(head.weight) is nn.Parameter and head.weight.is_floating_point()


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def out_features(head: nn.Module, hidden: torch.Tensor) -> int:
    known = getattr(head, "out_features", None)
    return known if known is not None else head(hidden[:1]).shape[-1]


def chunk_rows(vocabulary: int, hidden: torch.Tensor) -> int:
    budget = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES
    return max(FEWEST, budget // (4 * vocabulary))


class FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        rows = chunk_rows(head.out_features, hidden)
        needs_gradient = ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradients = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(needs_gradient):
                inputs = hidden[part].detach().requires_grad_(needs_gradient)
                outputs = head(inputs)
            logits = outputs.detach().float()  # (rows, vocabulary)
            wanted = targets[part, None]
            total = logits.logsumexp(1, keepdim=True)
            losses[part] = (total - logits.gather(1, wanted)).squeeze(1)
            if gradients is not None:
                logits.sub_(total).exp_()  # the softmax; the outputs may have gone with that, and are not needed
                logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0))
                (gradients[part],) = torch.autograd.grad(outputs, inputs, logits.to(outputs.dtype))
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx, above: torch.Tensor):
        (gradients,) = ctx.saved_tensors
        return (gradients * above[:, None].to(gradients.dtype) if gradients is not None else None), None, None
