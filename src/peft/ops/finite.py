"""Whether tensors hold NaN or infinity, told by sums and norms: a tenth of the cost for almost every sound tensor."""

import torch


def not_finite(W):
    """Whether one float tensor holds NaN or infinity."""
    return not W.sum(dtype=torch.float32).isfinite() and not W.isfinite().all()


def keys_not_finite(tensors):
    """Keys of the float tensors that hold NaN or infinity; one pass over the values."""
    keys = [k for k, t in tensors.items() if t.is_floating_point() and not t.is_meta and t.numel() and t.itemsize > 1]
    if not keys:
        return []
    try:  # a norm of finite numbers is finite but for overflow, and takes a tenth of the time of isfinite()
        norms = torch.stack([n.float().cpu() for n in torch._foreach_norm([tensors[k] for k in keys])]).isfinite()
        keys = [k for k, finite in zip(keys, norms.tolist()) if not finite]
    except (RuntimeError, NotImplementedError):  # a dtype or tensor subclass that the batched form does not know
        pass
    return [k for k in keys if not tensors[k].isfinite().all()]
