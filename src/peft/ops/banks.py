"""Mixed batches: the factors of several adapters stacked, so that all rows go through two batched products."""

import torch

from peft.ops.sources import Sources

MOST = 4  # banks of a layer; a server that mixes ever new sets would otherwise keep a copy of each


class Bank:
    """A (adapters, in, r) and s·B (adapters, r, out) of one layer and tuple of adapters, short ranks zero-padded."""

    def __init__(self, layer, names, adapters, factors, dtype):
        self.names, self.held = names, frozenset(names)
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
    """A bank of these adapters on a layer, and maybe of others; None where one of them is more than a pair of factors.

    A server's batches change by one adapter at a time. To stack all factors anew costs more than to multiply those of
    a few adapters for nothing, so a bank serves every part of it that is at least half.
    """
    bank = _known(layer.banks, names, x.dtype)
    if bank is not None:
        return bank
    adapters = [layer.adapters[n] for n in names]
    factors = [a.low_rank() for a in adapters]
    if any(f is None or f.row_scale is not None or f.dropout or not isinstance(f.s, float) for f in factors):
        return None
    factors = [f.absorbed() for f in factors]
    for key in list(layer.banks)[: 1 - MOST]:  # the oldest; another thread may do the same
        layer.banks.pop(key, None)
    layer.banks[names, x.dtype] = bank = Bank(layer, names, adapters, factors, x.dtype)
    return bank


def _known(banks, names, dtype):
    """The smallest bank that holds these names, and is still right."""
    found = banks.get((names, dtype))
    if found is None:
        wanted = set(names)
        fitting = [b for (_, d), b in list(banks.items()) if d is dtype and len(b.names) <= 2 * len(names)]
        found = min((b for b in fitting if wanted <= b.held), key=lambda b: len(b.names), default=None)
    if found is not None and not found.sources.unchanged():
        banks.pop((found.names, dtype), None)
        found = None
    return found


def add(y, x, bank, plan):
    """y += each row's own low-rank update, in place; x (rows, ..., in), y (rows, ..., out)."""
    layout, slots = plan.layout(bank.names, x.shape[0]), len(bank.names)
    xs = x if layout.index is None else x.index_select(0, layout.index)
    h = torch.bmm(xs.reshape(slots, -1, x.shape[-1]), bank.A)
    if layout.index is None:
        y.view(slots, -1, y.shape[-1]).baddbmm_(h, bank.B)
        if bank.bias is not None:
            y.view(slots, -1, y.shape[-1]).add_(bank.bias[:, None])
        return y
    update = torch.bmm(h, bank.B) if bank.bias is None else torch.baddbmm(bank.bias[:, None], h, bank.B)
    update = update.view(-1, *y.shape[1:]).index_select(0, layout.places)
    return y.add_(update) if layout.rows is None else y.index_add_(0, layout.rows, update)


def _padded(t, rank, dim):
    missing = rank - t.shape[dim]
    return t if not missing else torch.nn.functional.pad(t, (0, missing) if dim == 1 else (0, 0, 0, missing))
