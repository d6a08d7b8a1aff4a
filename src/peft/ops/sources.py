"""Whether something computed from a model's tensors is still right: a check of a fraction of a microsecond a tensor."""

import torch


class Sources:
    """Tensors by their place in the model, as they were when something was computed from them.

    places: (slots, name, value, owner, key, tensor) as `Adapter.places` gives them: `slots[name]` is the adapter's
    entry `value`, `owner[key]` the tensor in it. values: ((dict, key), ...) of plain values that were used too.
    """

    def __init__(self, places, values=()):
        self.places = [(*place, place[-1].data_ptr(), _version(place[-1])) for place in places]
        self.values = [(d, k, d.get(k)) for d, k in values]

    def unchanged(self):
        """False once a tensor was replaced, moved or written to, or a value set."""
        for slots, name, value, owner, key, tensor, address, version in self.places:
            if slots.get(name) is not value or owner.get(key) is not tensor or tensor.data_ptr() != address:
                return False
            if version >= 0 and tensor._version != version:
                return False
        return all(d.get(k) == v for d, k, v in self.values)


def _version(tensor):
    return -1 if tensor.is_inference() else tensor._version


def stamp(t):
    """Changes when the values do of a tensor, or of those that a dict or a quantized tensor is made of.

    Of anything else, when it is another object.
    """
    if isinstance(t, dict):
        return tuple(stamp(v) for v in t.values() if isinstance(v, torch.Tensor))
    if not isinstance(t, torch.Tensor) or t.is_mkldnn:  # oneDNN's own order: nothing writes into it
        return id(t)
    if hasattr(t, "__tensor_flatten__"):  # it has no memory of its own
        return tuple(stamp(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    return (t.data_ptr(), t.dtype, _version(t))
