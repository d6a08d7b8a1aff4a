"""What a method author writes. One Adapter = one (layer, adapter name) pair; it owns no tensors itself."""

import math
import warnings

import torch

from peft.core.fields import (  # noqa: F401  method files take theirs from here
    Buf,
    BufferDict,
    Derived,
    Field,
    Mod,
    Param,
    Slot,
    Val,
    entry_slots,
    module_slots,
)
from peft.errors import CheckpointError


def through(module, x):
    """module(x), or x where there is no module: dropout that a config leaves out is not made."""
    return x if module is None else module(x)


def dropout_rate(module):
    """The probability with which a dropout module, or None, drops now."""
    return module.p if module is not None and module.training else 0.0


class Adapter:
    """Root of all layer methods: declare fields, `build` them, then define one seam.

    input(x) -> x            change what the base layer sees            (OFT, IA3 on feed-forward)
    output(x, y) -> y        change what the base layer returns         (LoRA, IA3, Poly, routers, bottlenecks)
    merged_weight(W) -> W'   say what the base weight becomes on merge; omit it and the method cannot be merged
    module() -> module       what acts in place of a layer of the kind "whole"
    low_rank()               a pair of factors, where that is all there is: linear layers then take the fused path

    Weights are always canonical (out, in, *kernel) and dequantized, whatever the layer kind or backend.
    """

    prefix = ""
    kinds: tuple[str, ...] = ("linear",)  # names of the layer kinds it can adapt
    renames: dict[str, str] = {}  # checkpoint spelling of a key ending, where it differs from the model's
    parallel = True  # several adapters on one layer: each acts on the pristine W (else on what the last one made)
    by_row = True  # what becomes of a sample depends on that sample alone
    changes_input = changes_bias = False
    remakes_from = 0  # rows of x from which on `remakes` pays; fewer go through `output`
    folds = True  # False: its output differs from call to call, so that no weight does the same
    rounds = False  # True: in half precision, W + delta may be rounded, so that one product is enough
    converts = False  # True: its update is a fixed delta of W, so that there is a LoRA close to it
    follows_ties = False  # True: an adapter on one of two tied layers is always made on the other too
    fields: dict[str, Field] = {}
    trained_fields: list[tuple[str, str]] = []  # (name, name of the dict inside the container)
    shared_fields: list[str] = []
    trained_shared: list[str] = []

    def __init_subclass__(cls):
        cls.fields = {**cls.fields, **{k: f for k, f in vars(cls).items() if isinstance(f, Field)}}
        cls.trained_fields = [(k, f.entries) for k, f in cls.fields.items() if f.trainable]
        cls.shared_fields = [k for k, f in cls.fields.items() if f.shared]
        cls.trained_shared = [k for k, f in cls.fields.items() if f.trainable and f.shared]
        cls.changes_input = cls.input is not Adapter.input
        cls.changes_bias = cls.merged_bias is not Adapter.merged_bias

    def __init__(self, layer, name, key=""):
        self.layer, self.name, self.key = layer, name, key
        self.config = None  # what it was built from
        self.frozen = False  # True: activating it does not make it trainable
        self.trainable = True  # what set_trainable said last
        self.borrowed = False  # True: its tensors belong to an adapter on another layer, which saves them

    # -- what the layer offers the author ------------------------------------------------------------------------
    @property
    def kind(self):
        return self.layer.kind

    @property
    def base(self):
        return self.layer.get_base_layer()

    @property
    def training(self):
        return self.layer.training

    @property
    def base_dtype(self):
        """The dtype that the base layer computes in, however it is stored."""
        return self.kind.placement(self.base, self.layer.backend)[1]

    @property
    def base_device(self):
        return self.kind.placement(self.base, self.layer.backend)[0]

    def base_weight(self):
        """The pristine base weight, also while merged."""
        return self.layer.base_weight()

    # -- seams ---------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, config, key):
        """The class of the adapter that a config asks for on the layer `key`: this one, or a subclass of it."""
        return cls

    def build(self, config, where):
        """Create the fields, uninitialised. `where`: device and dtype for new tensors, as keyword arguments."""
        raise NotImplementedError

    @classmethod
    def share(cls, config, layers, where):
        """The entries of the shared fields, {field: value}, before any layer is built.

        layers: {key: AdapterLayer} of all that the adapter will be on, in the model's order.
        """
        return {}

    @classmethod
    def unsaved(cls, config):
        """Names of saved fields that this config leaves out of files."""
        return ()

    @classmethod
    def to_file(cls, config, tensors):
        """What a file holds in place of {file key: tensor}."""
        return tensors

    @classmethod
    def from_file(cls, config, tensors, adapters):
        """The inverse of `to_file`, before anything is checked. adapters: those of all layers, which may be rebuilt."""
        return tensors

    def derive(self, config):
        """Compute the fields that follow from the base weight and are in no file."""

    def reset(self, config):
        """Initialise the fields that a file would hold."""

    def input(self, x):
        return x

    def output(self, x, y):
        return y

    def beside(self, x, y, y0):
        """`output` where other adapters act too: y0 is what the base layer alone returned, y what they made of it."""
        return y + (self.output(x, y0) - y0) if self.parallel else self.output(x, y)

    def low_rank(self):
        return None

    def remakes(self):
        """None; or, where delta(W) is cheap to make and not random, the dropout probability on the input of it alone.

        Linear layers then make W' = remade_weight(W) twice, once for each pass, and keep none: see ops/remade.py.
        """
        return None

    def remade_weight(self, W):
        return self.merged_weight(W)

    def aside(self):
        """A `LowRank` that acts beside a remade weight, which leaves it out."""
        return None

    def instead(self, x):
        """None; or the adapted layer's whole output, where that costs less than adding to the base layer's.

        Asked of an adapter that acts alone on a linear layer whose call is nothing but its matrix product.
        """
        return None

    def module(self):
        raise NotImplementedError

    def merged_weight(self, W):
        raise NotImplementedError(f"{type(self).__name__} cannot be merged: what it does is no fixed weight.")

    def delta(self, W):
        """merged_weight(W) - W."""
        return self.merged_weight(W) - W

    def merged_bias(self, b, W):
        """The base layer's bias after a merge; b may be None."""
        return b

    def native_scaling(self):
        """The scaling it was made with, of a method with a field `scaling`."""
        raise NotImplementedError

    def frozen_fields(self):
        """Names of fields that stay frozen although they are parameters."""
        return ()

    # -- state ---------------------------------------------------------------------------------------------------
    def places(self, skip=()):
        """(slots, name, value, owner, key, tensor) of each parameter: slots[name] is this adapter's entry, owner[key]
        the tensor in it."""
        containers = self.layer._modules
        for field, entries in self.trained_fields:
            if field not in containers or field in skip:
                continue
            slots = getattr(containers[field], entries)
            value = slots.get(self.name)
            if isinstance(value, torch.Tensor):
                yield slots, self.name, value, slots, self.name, value
            elif value is not None:
                for module in value.modules() if value._modules else (value,):
                    for key, p in module._parameters.items():
                        if p is not None:
                            yield slots, self.name, value, module._parameters, key, p

    def parameters(self, frozen=False):
        """The trained tensors of this adapter (with frozen=True also those that stay frozen)."""
        for *_, tensor in self.places(() if frozen else self.frozen_fields()):
            yield tensor

    def set_trainable(self, trainable):
        self.trainable = trainable
        for p in self.parameters():
            p.requires_grad = trainable

    def saved_slots(self):
        """The slots, keys relative to the layer, of what a file holds of this adapter; the tuner has shared ones."""
        if self.borrowed:
            return []
        left_out = self.unsaved(self.config)
        fields = [f for n, f in self.fields.items() if f.saved and not f.shared and n not in left_out]
        return [slot for f in fields for slot in f.slots_of(self)]

    def settle(self):
        """Give what a file left out, and is still on the meta device, its initial values."""
        slots = [s for s in self.saved_slots() if s.owner is not None]
        if not any(s.tensor.is_meta for s in slots):
            return
        device = self.layer.placement()["device"]
        size = sum(s.tensor.numel() for s in slots if s.tensor.is_meta)
        if size > 16 * max(math.prod(self.layer.shape), 1 << 16):  # r=10**8 in a hostile file would fill the memory
            raise CheckpointError(
                f"The file of adapter {self.name!r} leaves out {self.key or type(self.base).__name__}, whose settings "
                f"ask for {size:,} numbers, many more than the layer has itself. They are wrong."
            )
        filled = [(s, s.tensor.detach().clone()) for s in slots if not s.tensor.is_meta]
        for slot in slots:
            if slot.tensor.is_meta:
                slot.replace(torch.empty_like(slot.tensor, device=device))
        with torch.no_grad():
            self.reset(self.config)
            for slot, value in filled:
                slot.owner[slot.name].copy_(value)
        self.layer._changed()

    def correct_layout(self, config):
        """Make config.fan_in_fan_out, which files hold, say how a linear base stores its weight."""
        stored = type(self.kind).__name__ == "Conv1D"
        if self.kind.name == "linear" and config.fan_in_fan_out != stored:
            warnings.warn(
                f"{self.key} is a {type(self.base).__name__}: fan_in_fan_out becomes {stored} in the config.",
                stacklevel=8,
            )
            config.fan_in_fan_out = stored

    def cast(self, x, dtype):
        """x in the adapter's dtype, unless autocast or the user sees to dtypes."""
        if not self.layer.cast_input_dtype_enabled or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    @classmethod
    def file_key(cls, key, name):
        """A slot's key as it stands in a file: without the adapter's name, and respelled."""
        field, _, rest = key.partition(".")
        key = field + rest.removeprefix(name)
        return cls.renames.get(key, key)


class Additive(Adapter):
    """W' = W + delta_weight(). Forward and merge come for free; override `output` for a cheaper path."""

    def delta_weight(self):
        """(out, in, *kernel), what this adapter adds to W."""
        raise NotImplementedError

    def acting_delta(self):
        """The delta of this forward: override it for dropout on the weight, which a merge must not have."""
        return self.delta_weight()

    def output(self, x, y):
        return y + self.layer.op(x, self.acting_delta().to(y.dtype))

    def delta(self, W):
        return self.delta_weight().to(W.dtype)

    def merged_weight(self, W):
        return W + self.delta(W)


class Reweight(Adapter):
    """W' = merged_weight(W), any function of W. Forward comes for free; override `output` for a cheaper path."""

    parallel = False

    def output(self, x, y):
        return self._reweighted(x, y, self.base_weight())

    def beside(self, x, y, y0):
        return self._reweighted(x, y, self.layer.weight_before(self))

    def _reweighted(self, x, y, W):
        return y + self.layer.op(x, (self.merged_weight(W) - W).to(y.dtype))
