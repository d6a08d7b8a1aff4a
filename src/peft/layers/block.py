"""Whole blocks of a model, for methods that change the hidden states between them."""

from peft.errors import AdapterError
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
        hidden, whole = self.parted(self.plain(layer, x, *args, **kwargs))
        for a in active:
            hidden = a.output(x, hidden)
        return whole(hidden)

    def parted(self, returned):
        if isinstance(returned, tuple):
            return returned[0], lambda y: (y, *returned[1:])
        return returned, lambda y: y

    def mixed(self, layer, plan, x, *args, **kwargs):
        raise AdapterError(
            f"adapter_names cannot choose an adapter per sample here: {type(layer.get_base_layer()).__name__} is "
            "adapted as a whole. Run one batch per adapter."
        )

    def merge(self, layer, adapter, safe_merge):
        return adapter.merged_weight(None)
