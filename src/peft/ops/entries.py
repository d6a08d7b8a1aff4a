"""Single trained entries of a weight: indices int32 (2, n), rows of the weight first, in row order, and values (n,).

Many rows of x take one product with the changed weight. For few rows that would cost far more than the layer itself;
they take a sparse product, which `embedding_bag` is: output row o is the sum of inputs `columns`, weighted by values.
"""

import torch
import torch.nn.functional as F

from peft.errors import CheckpointError
from peft.ops import lowrank


def put(W, indices, values):
    """W with values added at the entries, summed in float32 or better; a new tensor in W's dtype."""
    where = indices.long().unbind()  # converted once, for all that indexing does in both passes
    old = W[where]
    return W.index_put(where, (old.to(torch.promote_types(old.dtype, values.dtype)) + values).to(W.dtype))


def output(x, shape, indices, values):
    """x (..., in) times the weight of `shape` (out, in) that has only these entries."""
    x2 = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() or len(x2) > lowrank.FEW:
        return F.linear(x, values.new_zeros(shape).index_put(tuple(indices), values).to(x.dtype))
    x2 = x2.to(torch.promote_types(x.dtype, values.dtype))
    starts = torch.searchsorted(indices[0], torch.arange(shape[0], dtype=indices.dtype, device=indices.device))
    bags = F.embedding_bag(
        indices[1], x2.t().contiguous(), starts.int(), mode="sum", per_sample_weights=values.to(x2.dtype)
    )
    return bags.t().reshape(*x.shape[:-1], shape[0]).to(x.dtype)


def checked(tensors, ending, shapes):
    """Tensors of a file, with indices as int32, and each layer's entries in row order.

    ending: (of the keys of indices, of those of their values). shapes: {path: shape of the layer's weight}. Raises
    CheckpointError for entries that a weight does not have, or has twice.
    """
    tensors = dict(tensors)
    for key in [k for k in tensors if k.endswith(ending[0])]:
        path = key.removesuffix(ending[0])
        shape, values = shapes.get(path.removeprefix("base_model.model.")), path + ending[1]
        indices = tensors[key] = tensors[key].to(torch.int32)  # written as float32 on Windows
        if shape is None or indices.ndim != 2 or len(indices) != 2 or values not in tensors:
            continue  # whoever compares the file with the model says so
        flat, bounds = indices[0].long() * shape[1] + indices[1], torch.tensor(shape)[:, None]
        inside, order = bool(((indices >= 0) & (indices < bounds)).all()), None
        if not (flat[1:] > flat[:-1]).all():
            flat, order = flat.sort()
        if not inside or (flat[1:] == flat[:-1]).any():
            raise CheckpointError(
                f"{key!r} names entries outside of the weight of shape {tuple(shape)}, or names one twice. It is "
                "damaged, or was made for another model; nothing was loaded."
            )
        if order is not None and tensors[values].shape == order.shape:
            tensors[key], tensors[values] = indices[:, order], tensors[values][order]
    return tensors
