"""Tensors on the meta device that say they are on another one, so that code takes the branches it takes there."""

import contextlib
from unittest import mock

import torch
import torch.utils.checkpoint as checkpointing
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode

from peft.ops.remembered import forget

META = torch.device("meta")
SDPA = torch.nn.functional.scaled_dot_product_attention
ASKED = {torch.Tensor.device.__get__: None} | {
    getattr(torch.Tensor, f"is_{kind}").__get__: kind for kind in ("meta", "cpu", "cuda", "xpu", "mps")
}  # what a tensor is asked about its device -> the device type that the answer is true for

READ = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item}
COMPARED = {torch.allclose, torch.equal}
SPARSE = {  # products that meta tensors do not know where one is sparse -> what has the shape of the result
    torch.addmm: lambda more, S, wide, **settings: torch.empty_like(more),
    torch.sparse.sampled_addmm: lambda S, q, h, **settings: S,
}


@contextlib.contextmanager
def on_shapes(tracker, device):
    """Code in here runs on meta tensors as it would run on those of `device`."""
    checks = checkpointing._allowed_determinism_checks_to_fns  # they see a tensor's two devices
    unchecked = mock.patch.dict(checks, dict.fromkeys(checks, checks["none"]))
    forget()
    try:
        with tracker, Pretend(device), _config.patch(meta_nonzero_assume_all_nonzero=True), unchecked:
            yield
    finally:
        forget()


def backward(loss):
    """loss.backward(); that would be a call that Pretend steps aside for, and the backward pass runs inside of it."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


class Pretend(TorchFunctionMode):
    """While inside, meta tensors are on `device` for all that Python can ask, and new ones for it are meta tensors.

    Attention runs through the kernel that `device` would use: on meta torch would hold all of its weights.
    """

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in ASKED:
            if not args[0].is_meta:
                return function(*args)
            kind = ASKED[function]
            return self.device if kind is None else kind == self.device.type
        if function in READ and args[0].is_meta:  # a value that decides something: none is as usual as a random one
            return function(torch.rand(args[0].shape).to(args[0].dtype), *args[1:])
        if function in COMPARED and args[0].is_meta:
            return True
        if function in SPARSE and any(a.layout is not torch.strided for a in args):
            return SPARSE[function](*args, **kwargs)
        if function is torch.Tensor.cpu:
            return args[0]
        if function is SDPA:
            return self.attention(*args, **kwargs)
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == self.device.type and kwargs.get("generator") is None:
                kwargs = {**kwargs, "device": META}
        elif any(isinstance(a, torch.device) for a in args):  # x.to(device)
            args = [META if isinstance(a, torch.device) and a.type == self.device.type else a for a in args]
        return function(*args, **kwargs)

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if not self.fused(q, k, v, attn_mask, enable_gqa=enable_gqa, **settings):
            return SDPA(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **settings)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=q.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what it keeps is what the others keep
        return kernel(q, k, v, attn_mask=attn_mask, **settings)[0]

    def fused(self, q, k, v, mask, **settings):
        """Whether torch takes a kernel that never holds the attention weights, asked of it with tensors as wide."""
        if q.dim() != 4 or (mask is not None and mask.requires_grad):
            return False
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return True
        few = [torch.empty(1, t.shape[1], 2, t.shape[3], dtype=t.dtype, device=self.device) for t in (q, k, v)]
        mask = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=mask.dtype, device=self.device)
        return torch._fused_sdp_choice(*few, attn_mask=mask, **settings) != 0
