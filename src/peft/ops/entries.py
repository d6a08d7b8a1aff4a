"""Single trained entries of a weight: values (n,), and int32 indices, either flat (n,) or (2, n) with rows first.

Many rows of x take one product with the changed weight. For few rows that would cost far more than the layer itself;
they take a sparse product, which `embedding_bag` is: output row o is the sum of inputs `columns`, weighted by values.
"""

import torch
import torch.nn.functional as F

from peft.errors import CheckpointError
from peft.ops import lowrank


def put(W, indices, values):
    """W with values added at the entries, summed in float32 or better; a new tensor in W's dtype."""
    old, flat = W.flatten(), _flat(indices, W.shape)
    if W.dtype.itemsize >= values.dtype.itemsize:
        new = old.index_add(0, flat, values.to(W.dtype))
    else:
        new = old.index_copy(0, flat, (old[flat].to(values.dtype) + values).to(W.dtype))
    return new.view(W.shape)


def dense(shape, indices, values):
    """The weight of `shape` that has only these entries."""
    return values.new_zeros(shape).flatten().index_copy(0, _flat(indices, shape), values).view(shape)


class Bags:
    """The entries of one weight in row order, as few rows need them; made when asked for, and again after a change."""

    def __init__(self):
        self.made_from, self.version, self.made = None, -1, None

    def of(self, indices, shape):
        """(start of each row's entries, columns, order of the values or None where they lie in row order)."""
        version = -1 if indices.is_inference() else indices._version
        if self.made_from is not indices or self.version != version:
            flat, order = _flat(indices, shape), None
            if not _ascends(flat):
                flat, order = flat.sort()
            starts = torch.searchsorted(flat, torch.arange(shape[0], device=flat.device) * shape[1])
            self.made = starts.int(), (flat % shape[1]).int(), order
            self.made_from, self.version = indices, version
        return self.made


def output(x, shape, indices, values, bags):
    """x (..., in) times the weight of `shape` (out, in) that has only these entries."""
    x2 = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(x2) > lowrank.FEW:
        return F.linear(x, dense(shape, indices, values).to(x.dtype))
    starts, columns, order = bags.of(indices, shape)
    x2 = x2.to(torch.promote_types(x.dtype, values.dtype))
    values = (values if order is None else values[order]).to(x2.dtype)
    y = F.embedding_bag(columns, x2.t().contiguous(), starts, mode="sum", per_sample_weights=values)
    return y.t().reshape(*x.shape[:-1], shape[0]).to(x.dtype)


def checked(tensors, ending, shapes):
    """The tensors of a file, with indices as int32.

    ending: of the keys of indices. shapes: {path: shape of the layer's weight}. Raises CheckpointError for entries that
    a weight does not have, or has twice.
    """
    tensors = dict(tensors)
    for key in [k for k in tensors if k.endswith(ending)]:
        tensors[key] = indices = tensors[key].to(torch.int32)  # upstream writes float32 on Windows
        shape = shapes.get(key.removesuffix(ending).removeprefix("base_model.model."))
        if shape is None or indices.ndim > 2 or (indices.ndim == 2 and len(indices) != 2):
            continue  # whoever compares the file with the model says so
        bounds = torch.tensor(shape)[:, None] if indices.ndim == 2 else shape[0] * shape[1]
        if not ((indices >= 0) & (indices < bounds)).all() or not _distinct(_flat(indices, shape), shape):
            raise CheckpointError(
                f"{key!r} names entries outside of the weight of shape {tuple(shape)}, or names one twice. It is "
                "damaged, or was made for another model; nothing was loaded."
            )
    return tensors


def _flat(indices, shape):
    """int64 in one dimension: indexing with it is three times faster."""
    return indices.long() if indices.ndim == 1 else indices[0].long() * shape[1] + indices[1]


def _ascends(flat):
    return bool((flat[1:] > flat[:-1]).all())


def _distinct(flat, shape):
    return _ascends(flat) or int(
        torch.zeros(shape[0] * shape[1], dtype=torch.bool).index_fill(0, flat, True).sum()
    ) == len(flat)
