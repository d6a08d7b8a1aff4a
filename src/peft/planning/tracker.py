"""Which tensors are alive at which moment of a computation on the meta device, where they have a size but no memory."""

import functools
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
ITEM, ANY, COUNTS = aten._local_scalar_dense.default, aten.any.default, aten.bincount.default


class Tracker(TorchDispatchMode):
    """While inside, records birth and death of each storage on the meta device, but for those of the tensors `known`.

    live, peak   bytes that are alive now, and that were at the worst moment since `mark`
    clock        counts births: a moment is what the clock said
    timeline     what was alive at each birth
    """

    def __init__(self, known=()):
        super().__init__()
        self.alive = dict.fromkeys((key_of(tensor) for tensor in known), (None, 0, 0))  # key -> (ref, bytes, birth)
        self.clock = self.live = self.peak = 0
        self.timeline = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            kwargs = kwargs or {}
            tensors = list(tensors_in((args, kwargs)))
            if any(t.is_meta for t in tensors):
                if function is ITEM:
                    return not getattr(args[0], "rare", False)  # `(mask == 1).all()`, not `isnan(x).any()`
                if not all(t.is_meta or t.dim() == 0 for t in tensors):  # made without a device: real, and small
                    args, kwargs = tree_map_only(torch.Tensor, on_meta, (args, kwargs))
            out = computed(function, args, kwargs)
            if function is ANY:
                out.rare = True
            for tensor in tensors_in(out):
                if tensor.is_meta:
                    self.see(tensor)
            return out

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.clock += 1
        self.alive[key] = (weakref.ref(storage, lambda ref: self.forget(key)), size, self.clock)
        self.live += size
        self.timeline.append(self.live)
        self.peak = max(self.peak, self.live)

    def forget(self, key):
        _, size, _ = self.alive.pop(key)
        self.live -= size

    def mark(self):
        """Begin a new worst moment; the bytes alive now."""
        self.peak = self.live
        return self.live

    def born_since(self, clock):
        """Bytes alive now that were not there when the clock said `clock`."""
        return sum(size for _, size, birth in self.alive.values() if birth > clock)


# -- the same operation on the same shapes, as in every block, is computed once --------------------------------------
_results: dict = {}  # key of a call -> what its tensors are made of


def computed(function, args, kwargs):
    """function(*args, **kwargs) on the meta device."""
    if function is COUNTS and args[2:] > (0,):  # the least number; else as many as the largest value says
        return args[0].new_empty(args[2])
    if (kind := kind_of(function)) == "in place":
        return args[0]
    if kind != "pure":
        return function(*args, **kwargs)
    try:
        key = (function, described(args), described(tuple(kwargs.items())))
        known = _results.get(key)
    except (TypeError, RuntimeError):  # an argument that cannot be hashed, or has no strides
        return function(*args, **kwargs)
    if known is None:
        out = function(*args, **kwargs)
        if type(out) is torch.Tensor and out.is_meta and out.layout is torch.strided:
            _results[key] = (tuple(out.shape), out.stride(), out.dtype)
        return out
    size, stride, dtype = known
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


@functools.cache
def kind_of(function):
    """ "pure": makes one new tensor; "in place": returns its first argument, whose shape stays; else "other"."""
    schema = function._schema
    aliases = [a for a in (*schema.arguments, *schema.returns) if a.alias_info is not None]
    if not aliases:
        return "pure" if len(schema.returns) == 1 else "other"
    same = torch.Tag.inplace_view not in function.tags and schema.name.rpartition("::")[2].endswith("_")
    return "in place" if same and len(schema.returns) == 1 and aliases[0] is schema.arguments[0] else "other"


def described(value):
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    return type(value), value  # 1, 1.0 and True are equal keys


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:  # what a sparse one consists of is strided, and was seen before
            yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def on_meta(tensor):
    return tensor if tensor.is_meta else tensor.to("meta")


def key_of(tensor):
    return tensor.untyped_storage()._cdata


def size_of(tensors):
    """Bytes of the distinct storages."""
    return sum({key_of(t): t.untyped_storage().nbytes() for t in tensors}.values())
