"""nn.Embedding: a linear layer on one-hot input, so its canonical weight is (dim, vocabulary) = Wᵀ."""

import torch
import torch.nn.functional as F
from torch import nn

from peft.layers.kind import Kind


class Embedding(Kind):
    """An embedding table; x is integer ids. Scaled embeddings (`embed_scale`, Gemma) scale the adapter's part too."""

    name = "embedding"

    @staticmethod
    def owns(base):
        return isinstance(base, nn.Embedding)

    def shape(self, base):
        return base.embedding_dim, base.num_embeddings

    def canon(self, W):
        return W.T

    def uncanon(self, W):
        return W.T

    def lookup(self, base, x, table):
        """Rows `x` of a (vocabulary, anything) table, with the base layer's settings for gradients."""
        return F.embedding(x, table, base.padding_idx, None, base.norm_type, base.scale_grad_by_freq, base.sparse)

    def scaled(self, base, y):
        scale = getattr(base, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)

    def op(self, base, x, W):
        return self.scaled(base, self.lookup(base, x, W.T))

    def factors(self, base, r, bias, **where):
        """Tensors, not modules: A (r, vocabulary), B (dim, r)."""
        out, inp = self.shape(base)
        return nn.Parameter(torch.empty(r, inp, **where)), nn.Parameter(torch.empty(out, r, **where))

    def factor_delta(self, A, B):
        return B @ A
