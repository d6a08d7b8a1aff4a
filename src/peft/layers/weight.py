"""Kinds whose module reads its weight directly (expert parameters, MultiheadAttention): adapt the weight, not x."""

import contextlib
import threading

import torch
from torch import nn

from peft.errors import AdapterError, ConfigError
from peft.layers.kind import Kind
from peft.layers.linear import linear

_swap = threading.RLock()  # the module itself is changed for the time of a forward, so one thread at a time


def _turn():
    """A context in which no other thread changes a module, or runs one that is changed."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _swap


@contextlib.contextmanager
def adapted(layer, active):
    """While inside, the base module reads the adapted weight under its parameter's name."""
    base, kind = layer.get_base_layer(), layer.kind
    W = layer.backend.unpack(base, layer.backend.get(base, kind.param))
    new = kind.uncanon(layer.adapted_weight(active, kind.canon(W))).to(W.dtype)
    with _turn():
        base.__dict__[kind.param] = new  # found before the parameter, which stays registered and untouched
        try:
            yield
        finally:
            del base.__dict__[kind.param]


class Weight(Kind):
    """`target_parameters`: a bare nn.Parameter, 2-D (out, in) or 3-D (experts); canonical 3-D is (out, in, expert)."""

    name = "param"
    composes = False

    def __init__(self, param="weight"):
        self.param = param

    def attach(self, layer):
        base = layer.get_base_layer()
        W = getattr(base, self.param)
        if W.ndim not in (2, 3):
            raise ConfigError(f"Parameter {self.param!r} has {W.ndim} dimensions; only 2 or 3 can be adapted.")
        self.ndim, self.in_out = W.ndim, bool(getattr(base, "is_transposed", False))
        self.experts = W.shape[0] if W.ndim == 3 else 1

    def shape(self, base):
        W = getattr(base, self.param)
        return tuple(self.canon(torch.empty(getattr(W, "ds_shape", W.shape), device="meta")).shape)

    def canon(self, W):
        """(expert, in, out) or (expert, out, in) -> (out, in, expert).

        Named as the file format has it: A reads the last axis of the stored parameter unless it is transposed.
        """
        return W if W.ndim == 2 else W.permute((2, 1, 0) if self.in_out else (1, 2, 0))

    def uncanon(self, W):
        return W if W.ndim == 2 else W.permute((2, 1, 0) if self.in_out else (2, 0, 1))

    def factors(self, base, r, bias, **where):
        out, inp = self.shape(base)[:2]
        return linear(inp, r * self.experts, False, **where), linear(r * self.experts, out, False, **where)

    def factor_delta(self, A, B):
        """A is (expert · r, in), expert-major; B is (out, r · expert), expert-minor."""
        if self.ndim == 2:
            return B @ A
        B, A = B.view(B.shape[0], -1, self.experts), A.view(self.experts, -1, A.shape[1])
        return torch.einsum("ore,eri->oie", B, A)

    def call(self, layer, active, x, *args, **kwargs):
        if not active:
            return self.plain(layer, x, *args, **kwargs)
        with adapted(layer, active):
            return layer.base_layer(x, *args, **kwargs)

    def plain(self, layer, x, *args, **kwargs):
        with _turn():
            return layer.base_layer(x, *args, **kwargs)

    def mixed(self, layer, plan, x, *args, **kwargs):
        raise AdapterError(
            f"adapter_names cannot choose an adapter per sample here: {type(layer.get_base_layer()).__name__} is "
            "adapted through its weight, which all samples share. Run one batch per adapter."
        )


class MHA(Weight):
    """nn.MultiheadAttention: in_proj is a bare parameter, out_proj a Linear of which it reads only `.weight`."""

    name = "mha"

    def __init__(self):
        super().__init__("in_proj_weight")

    @staticmethod
    def owns(base):
        return isinstance(base, nn.MultiheadAttention)

    def attach(self, layer):
        base = layer.get_base_layer()
        if not base._qkv_same_embed_dim:
            raise ConfigError("MultiheadAttention can be adapted only where query, key and value have the same width.")
        super().attach(layer)
        base.out_proj = type(layer)(base.out_proj, state=layer.state)
        base.out_proj.owned = True

    def added(self, layer, name, config, **how):
        layer.get_base_layer().out_proj.add_adapter(name, config, f"{layer.adapters[name].key}.out_proj", **how)

    def detach(self, layer):
        base = layer.get_base_layer()
        base.out_proj = base.out_proj.get_base_layer()

    def call(self, layer, active, x, *args, **kwargs):
        out = layer.get_base_layer().out_proj
        inner = [out.adapters[a.name] for a in active if a.name in out.adapters]  # as this call has chosen
        with adapted(out, inner) if inner else contextlib.nullcontext():
            return super().call(layer, active, x, *args, **kwargs)
