"""Mixed batches: the factors of several adapters stacked, so that all rows go through two batched products."""

import torch

from peft.ops.sources import Sources


class Bank:
    """A (adapters, in, r) and s·B (adapters, r, out) of one layer and tuple of adapters, short ranks zero-padded."""

    def __init__(self, layer, adapters, factors, dtype):
        rank = max(f.A.shape[0] for f in factors)
        scaling = layer.__dict__.get("scaling", {})
        W = layer.get_base_layer()._parameters  # factors may follow from it
        places = [(W, key, t, W, key, t) for key, t in W.items() if t is not None]
        places += [p for a in adapters for p in a.places()]
        self.sources = Sources(places, [(scaling, a.name) for a in adapters])
        self.A = torch.stack([_padded(f.A.to(dtype), rank, 0) for f in factors]).transpose(1, 2)
        self.B = torch.stack([_padded((f.B * f.s).to(dtype), rank, 1) for f in factors]).transpose(1, 2).contiguous()
        bias = [torch.zeros_like(f.B[:, 0]) if f.bias is None else f.bias * f.s for f in factors]
        self.bias = torch.stack(bias).to(dtype) if any(f.bias is not None for f in factors) else None


def of(layer, names, x):
    """The bank of these adapters on a layer, or None where one of them is more than a pair of factors."""
    key = (names, x.dtype)
    bank = layer.banks.get(key)
    if bank is not None and bank.sources.unchanged():
        return bank
    adapters = [layer.adapters[n] for n in names]
    factors = [a.low_rank() for a in adapters]
    if any(f is None or f.row_scale is not None or f.dropout or not isinstance(f.s, float) for f in factors):
        return None
    factors = [f.absorbed() for f in factors]
    if len(layer.banks) >= 4:  # a server that mixes ever new sets would otherwise keep a copy of each
        layer.banks.clear()
    layer.banks[key] = bank = Bank(layer, adapters, factors, x.dtype)
    return bank


def add(y, x, bank, plan):
    """y += each row's own low-rank update, in place; x (rows, ..., in), y (rows, ..., out)."""
    index, identity = plan.slots(x.shape[0], x.device)
    slots, longest = index.shape
    xs = x if identity else x[index.flatten()]
    h = torch.bmm(xs.reshape(slots, -1, x.shape[-1]), bank.A)
    if identity:
        y.view(slots, -1, y.shape[-1]).baddbmm_(h, bank.B)
        if bank.bias is not None:
            y.view(slots, -1, y.shape[-1]).add_(bank.bias[:, None])
        return y
    update = torch.bmm(h, bank.B) if bank.bias is None else torch.baddbmm(bank.bias[:, None], h, bank.B)
    update = update.view(slots, longest, *y.shape[1:])
    for i, rows in enumerate(plan.rows.values()):
        y.index_add_(0, rows, update[i, : len(rows)])
    return y


def _padded(t, rank, dim):
    missing = rank - t.shape[dim]
    return t if not missing else torch.nn.functional.pad(t, (0, missing) if dim == 1 else (0, 0, 0, missing))
