"""Whole attention modules of transformers, for methods that let the heads attend to something more."""

import torch

from peft.layers.kind import Kind
from peft.layers.linear import Conv1D, Linear


class Attention(Kind):
    """A module from hidden states (batch, tokens, width) to (output, weights), its heads `head_dim` wide.

    Adapters get the heads' queries (batch, heads, tokens, head_dim) in place of x, and change the output.
    """

    name = "attention"
    composes = False
    types: tuple[str, ...] = ()  # names of the classes that compute as this file says

    @classmethod
    def owns(cls, base):
        return type(base).__name__ in cls.types

    def shape(self, base):
        part = self.holder(base)
        return (Conv1D if Conv1D.owns(part) else Linear)().shape(part)

    def placement(self, base, backend):
        return backend.placement(self.holder(base), self.param)

    def merge(self, layer, adapter, safe_merge):
        return adapter.merged_weight(None)  # there is no one weight that an adapter could go into

    def holder(self, base):
        """The projection that makes the queries."""
        raise NotImplementedError

    def query(self, base, x, *args, **kwargs):
        """The queries that the heads make of x in a call with these further arguments."""
        raise NotImplementedError

    def keys_values(self, base, tokens):
        """Keys and values of further tokens (1, tokens, width), without positions: each (heads, tokens, head_dim)."""
        raise NotImplementedError

    def read(self, base, weights, v):
        """What the module returns where its heads read v (heads, n, head_dim) by weights (batch, heads, tokens, n)."""
        raise NotImplementedError

    def call(self, layer, active, x, *args, **kwargs):
        y, *rest = layer._modules["base_layer"](x, *args, **kwargs)
        if active:
            q, dtype = self.query(layer.get_base_layer(), x, *args, **kwargs), y.dtype
            for a in active:
                y = a.output(q, y)
            y = y.to(dtype)
        return y, *rest

    def mixed(self, layer, plan, x, *args, **kwargs):
        y, *rest = layer._modules["base_layer"](x, *args, **kwargs)
        q = self.query(layer.get_base_layer(), x, *args, **kwargs)
        return self.outputs_by_row(layer, plan, q, y), *rest


class RotaryAttention(Attention):
    """Separate projections, rotary positions, and keys and values that groups of heads share."""

    types = ("LlamaAttention", "MistralAttention")

    def holder(self, base):
        return base.q_proj

    def query(self, base, x, position_embeddings, *args, **kwargs):
        q = _heads(base.q_proj(x), base.head_dim)
        cos, sin = (t.unsqueeze(1) for t in position_embeddings)
        first, second = q.chunk(2, dim=-1)
        return q * cos + torch.cat([-second, first], dim=-1) * sin

    def keys_values(self, base, tokens):
        both = _heads(base.k_proj(tokens), base.head_dim)[0], _heads(base.v_proj(tokens), base.head_dim)[0]
        return tuple(t.repeat_interleave(base.num_key_value_groups, dim=0) for t in both)

    def read(self, base, weights, v):
        """Without the bias of o_proj: the module itself has added it."""
        heads, n, _ = v.shape
        few = heads * n < weights.shape[0] * weights.shape[2]  # then it is cheaper to project the values
        y = base.o_proj(torch.block_diag(*v) if few else (weights @ v).transpose(1, 2).flatten(2))
        y = y if base.o_proj.bias is None else y - base.o_proj.bias
        return weights.transpose(1, 2).flatten(2) @ y if few else y


class FusedAttention(Attention):
    """GPT-2's: one projection for queries, keys and values, and absolute positions."""

    types = ("GPT2Attention",)

    def holder(self, base):
        return base.c_attn

    def query(self, base, x, *args, **kwargs):
        c_attn, width = base.c_attn, base.split_size
        if Conv1D.owns(c_attn):
            return _heads(x @ c_attn.weight[:, :width] + c_attn.bias[:width], base.head_dim)
        return _heads(c_attn(x)[..., :width], base.head_dim)  # quantized: only the layer itself can read its weight

    def keys_values(self, base, tokens):
        _, k, v = base.c_attn(tokens).split(base.split_size, dim=-1)
        return _heads(k, base.head_dim)[0], _heads(v, base.head_dim)[0]

    def read(self, base, weights, v):
        """Not through c_proj: the adapters that there are for GPT-2 were trained without."""
        return (weights @ v).transpose(1, 2).flatten(2)


def _heads(x, head_dim):
    """(batch, tokens, heads · head_dim) -> (batch, heads, tokens, head_dim)."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)
