"""Compositions: how several adapters act together, when "one after the other" is not what is wanted.

`model.set_adapter(Average("a", "b"))`. Stack and Average nest in each other and act within each layer. Split and
Parallel choose among the samples of a batch; they take names only, and `adapter_names` of a call goes before them.
"""

import math

import torch

from peft.core.adapter import Reweight
from peft.core.state import Call
from peft.errors import AdapterError, ConfigError


class Composition:
    """Members, each an adapter name or, for those that nest, another composition. Raises ConfigError for bad ones."""

    nests = True

    def __init__(self, *members):
        if not members:
            raise ConfigError(f"{type(self).__name__} needs at least one adapter name.")
        for m in members:
            if not isinstance(m, str) and not (self.nests and isinstance(m, Composition) and m.nests):
                wanted = "adapter names, Stack and Average" if self.nests else "adapter names only"
                raise ConfigError(f"{type(self).__name__} takes {wanted}, got {m!r}.")
        self.members = members

    @property
    def names(self):
        """All adapter names in it, each once, in order."""
        inner = [m.names if isinstance(m, Composition) else (m,) for m in self.members]
        return tuple(dict.fromkeys(name for names in inner for name in names if name != Call.BASE))

    def to_json(self):
        """The composition as lists and dicts, for `read_composition`."""
        members = [m.to_json() if isinstance(m, Composition) else m for m in self.members]
        return {"kind": type(self).__name__, "members": members, **self.options()}

    def options(self):
        """What it was made with beside its members."""
        return {}

    def check(self, layers):
        """Raise AdapterError where a composition cannot act on layers as they are adapted."""
        for path, layer in layers.items():
            if not layer.kind.composes and any(name in layer.adapters for name in self.names):
                raise AdapterError(
                    f"{self!r} cannot act on {path}: it is adapted as a layer of the kind {layer.kind.name}, where "
                    "adapters do not act on an output. Activate a list of adapters, which act one after the other."
                )

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(map(repr, self.members))})"

    def __eq__(self, other):
        return type(self) is type(other) and self.__dict__ == other.__dict__


class Stack(Composition):
    """Each member acts on what the one before it made."""

    def act(self, site, x, y):
        for member in self.members:
            y = site.act(member, x, y)
        return y


class Average(Composition):
    """The weighted mean of what each member makes of the layer's output; a member that a layer lacks changes nothing.

    weights: one number a member, which need not add up to one; default: equal shares.
    """

    def __init__(self, *members, weights=None):
        super().__init__(*members)
        weights = [1 / len(members)] * len(members) if weights is None else list(weights)
        if len(weights) != len(members) or not all(math.isfinite(w) for w in weights):
            raise ConfigError(f"Average of {len(members)} members needs as many finite weights, got {weights}.")
        self.weights = weights

    def options(self):
        return {"weights": self.weights}

    def act(self, site, x, y):
        # As differences, so that weights of one member's share do not rescale the layer's own output.
        return y + sum(w * (site.act(m, x, y) - y) for m, w in zip(self.members, self.weights))


class ByRow(Composition):
    """A composition that gives each sample one adapter."""

    nests = False

    def check(self, layers):
        """Anything goes that goes with adapter_names."""

    def assign(self, size):
        """The adapter name of each of `size` samples."""
        raise NotImplementedError

    def prepare(self, args, kwargs, size):
        """The call's arguments, for the model to run on."""
        return args, kwargs


class Split(ByRow):
    """The first sizes[0] samples of a batch to the first adapter, the next sizes[1] to the second, and so on.

    sizes: default: equal parts. "__base__" as a name leaves samples to the base model.
    """

    def __init__(self, *members, sizes=None):
        super().__init__(*members)
        if sizes is not None and (len(sizes) != len(members) or any(n < 0 for n in sizes)):
            raise ConfigError(f"Split of {len(members)} adapters needs as many sizes of at least 0, got {sizes}.")
        self.sizes = sizes

    def options(self):
        return {"sizes": self.sizes}

    def assign(self, size):
        sizes = self.sizes
        if sizes is None:
            if size % len(self.members):
                raise AdapterError(f"{self!r} cannot part {size} samples equally; give sizes=, one for each adapter.")
            sizes = [size // len(self.members)] * len(self.members)
        if sum(sizes) != size:
            raise AdapterError(f"{self!r} has sizes={list(sizes)} for {sum(sizes)} samples, but the batch has {size}.")
        return [name for name, n in zip(self.members, sizes) for _ in range(n)]


class Parallel(ByRow):
    """The whole batch once for each adapter, in one pass: outputs are as many times as long, adapter by adapter."""

    def assign(self, size):
        return [name for name in self.members for _ in range(size)]

    def prepare(self, args, kwargs, size):
        def repeated(value):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == size:
                return value.repeat(len(self.members), *[1] * (value.ndim - 1))
            return value

        return tuple(map(repeated, args)), {k: repeated(v) for k, v in kwargs.items()}


KINDS = {cls.__name__: cls for cls in (Stack, Average, Split, Parallel)}


def read_composition(value):
    """The name or composition that `to_json` wrote. Raises ConfigError for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or value.get("kind") not in KINDS or not isinstance(value.get("members"), list):
        raise ConfigError(f"{value!r} is no composition of adapters; known are {', '.join(KINDS)}.")
    options = {k: v for k, v in value.items() if k not in ("kind", "members")}
    return KINDS[value["kind"]](*map(read_composition, value["members"]), **options)


class Site:
    """One adapted layer in a composed forward: its adapters of all methods, and what it returns without them."""

    def __init__(self, adapters, plain, y0):
        self.adapters, self.plain, self.y0 = adapters, plain, y0

    def act(self, member, x, y):
        """What a member makes of the layer's output y for the input x."""
        if not isinstance(member, str):
            return member.act(self, x, y)
        adapter = self.adapters.get(member)
        if adapter is None:
            return y
        first = y is self.y0
        h = adapter.input(x) if adapter.changes_input else x
        if not first and (h is not x or isinstance(adapter, Reweight)):
            raise AdapterError(
                f"Adapter {member!r} changes what {adapter.key} computes, not what it returns, so it cannot follow "
                "another adapter in this composition. Put it first in its Stack."
            )
        if h is not x:
            y = self.plain(h)
        return adapter.output(x, y) if first else adapter.beside(x, y, self.y0)


def forward(layer, block, x, *args, **kwargs):
    """An adapted layer's forward under a composition; the outermost wrapper speaks for those within it."""
    if isinstance(block, ByRow):
        raise AdapterError(f"{block!r} parts the batch of a call: call the PeftModel itself, not the model within it.")
    base, kind = layer.get_base_layer(), layer.kind
    y, whole = kind.parted(base(x, *args, **kwargs))
    y = layer.backend.guard(y)
    site = Site(chain(layer), lambda h: kind.parted(base(h.to(x.dtype), *args, **kwargs))[0], y)
    return whole(block.act(site, x, y).to(y.dtype))


def chain(layer):
    """{name: Adapter} of a wrapper and of those within it."""
    found = {}
    while hasattr(layer, "adapters"):
        found = {**layer.adapters, **found}
        layer = layer._modules["base_layer"]
    return found
