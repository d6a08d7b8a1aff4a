"""Whole blocks of a model, for methods that change the hidden states between them."""

from peft.layers.kind import Kind


class Block(Kind):
    """A module from hidden states (and more) to hidden states, or to a tuple that begins with them.

    Methods choose this kind, no base type does. It has no one weight, so nothing can be merged into it.
    """

    name = "block"

    @staticmethod
    def owns(base):
        return True

    def shape(self, base):
        """As if it were one column of all its numbers."""
        return sum(p.numel() for p in base.parameters()), 1

    def placement(self, base, backend):
        first = next(p for p in base.parameters() if p.is_floating_point())
        return first.device, first.dtype

    def call(self, layer, active, x, *args, **kwargs):
        for a in reversed(active):
            x = a.input(x)
        hidden, rest = _parts(self.plain(layer, x, *args, **kwargs))
        for a in active:
            hidden = a.output(x, hidden)
        return _joined(hidden, rest)

    def mixed(self, layer, plan, x, *args, **kwargs):
        x = self.inputs_by_row(layer, plan, x)
        hidden, rest = _parts(layer.base_layer(x, *args, **kwargs))
        return _joined(self.outputs_by_row(layer, plan, x, hidden), rest)

    def merge(self, layer, adapter, safe_merge):
        return adapter.merged_weight(None)


def _parts(y):
    """(hidden states, what else the block returned as a tuple, or None where that was all)."""
    return (y[0], y[1:]) if isinstance(y, tuple) else (y, None)


def _joined(hidden, rest):
    return hidden if rest is None else (hidden, *rest)
