"""The one wrapper around a base layer: adapters by name, activation, forward, merge, for every method alike."""

import itertools
import warnings
from types import SimpleNamespace

import torch
from torch import nn

from peft import layers, quant
from peft.core import compose
from peft.core.adapter import Adapter
from peft.core.scaling import Scalable
from peft.core.state import AdapterState, Stray, Switchable
from peft.errors import AdapterError, ConfigError, MergeError
from peft.ops.finite import not_finite


class AdapterLayer(Switchable, Scalable, nn.Module):
    """A base layer with adapters. Each method has a subclass that names its `adapter_cls`, for isinstance and repr.

    adapters  {adapter name: Adapter}; the tensors lie in containers named after the adapter's fields
    state     the model's active record, or this layer's own if it was switched alone
    """

    adapter_cls: type[Adapter]
    cast_input_dtype_enabled = True  # False: weights are stored in a dtype that inputs must not be cast to

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "adapter_cls" in cls.__dict__:
            fields = cls.adapter_cls.fields
            cls.adapter_layer_names = tuple(n for n, f in fields.items() if f.trainable)
            cls.other_param_names = tuple(n for n, f in fields.items() if not f.trainable)

    def __init__(self, base_layer, param=None, state=None):
        super().__init__()
        self._modules["base_layer"] = base_layer
        base = self.get_base_layer()
        kind = layers.find(base, param, self.adapter_cls.kinds)
        _check_kind(kind, base, self.adapter_cls)
        self.__dict__.update(  # at once: module attributes set one by one cost more than all the rest of wrapping
            kind=kind,
            backend=quant.find(base),
            state=AdapterState() if state is None else state,
            adapters={},
            folded=None,  # the weight that decoding uses, see ops/folded.py
            banks={},  # stacked factors for mixed batches, by tuple of adapters
            shared={},  # {field: container} of what all layers of an adapter share; the tuner's own dict
            owned=False,  # True: another wrapper made this one and takes it away
            _live=(None, ()),  # (active tuple it was made for, the adapters of it that this layer has)
            _present=(),
            _undo=[],  # what each merge replaced: (adapter name, packed weight, bias), newest last
            **{name: {} for name, f in self.adapter_cls.fields.items() if f.container is None and not f.shared},
        )
        self.kind.attach(self)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            field = self.adapter_cls.fields.get(name)
            if field is not None:  # no adapter uses this container, so it was not made: it reads as empty
                return self.shared.get(name, field.container()) if field.shared else field.container()
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)

    # -- base layer ----------------------------------------------------------------------------------------------
    def get_base_layer(self):
        """The original module, below all wrappers."""
        layer = self
        while isinstance(layer, AdapterLayer):
            layer = layer._modules["base_layer"]
        return layer

    @property
    def shape(self):
        """(out, in, *kernel) of the canonical weight."""
        return self.kind.shape(self.get_base_layer())

    @property
    def in_features(self):
        return self.shape[1]

    @property
    def out_features(self):
        return self.shape[0]

    @property
    def weight(self):
        return self.get_base_layer().weight

    @property
    def bias(self):
        return self.get_base_layer().bias

    def base_weight(self):
        """The pristine weight, dequantized, canonical layout, also while merged."""
        base = self.get_base_layer()
        packed = self._undo[0][1] if self._undo else self.backend.get(base, self.kind.param)
        return self.kind.canon(self.backend.unpack(base, packed))

    def set_base_weight(self, W):
        """Make a canonical W the base weight, stored as the one that it replaces."""
        base, param = self.get_base_layer(), self.kind.param
        old = self.backend.get(base, param)
        self.backend.put(base, param, self.backend.pack(base, self.kind.uncanon(W), old))

    def readable_base(self):
        """The base layer, or where its weight holds no numbers that mean something alone, one with those it stands for.

        For functions of the user's that look at a layer.
        """
        base = self.get_base_layer()
        return SimpleNamespace(weight=self.kind.uncanon(self.base_weight())) if self.backend.name else base

    def base_bias(self):
        """The pristine bias or None, also while merged."""
        return self._undo[0][2] if self._undo else getattr(self.get_base_layer(), "bias", None)

    def weight_before(self, adapter):
        """The weight that an active adapter acts on: what is merged, and the active ones before it, are in it."""
        base, merged = self.get_base_layer(), self.merged_adapters
        before = itertools.takewhile(lambda a: a is not adapter, self.live())
        W = self.kind.canon(self.backend.unpack(base, self.backend.get(base, self.kind.param)))
        return self.adapted_weight([a for a in before if a.name not in merged], W)

    def op(self, x, W):
        """The base operation with canonical weight `W` and no bias."""
        return self.kind.op(self.get_base_layer(), x, W)

    def pristine(self, x):
        """What the base layer alone returns, also while merged."""
        y = self.op(x, self.base_weight())
        bias = self.base_bias()
        return y if bias is None else y + self.kind.per_out(bias)

    # -- adapters ------------------------------------------------------------------------------------------------
    def placement(self, autocast=True):
        """{device, dtype} of new adapter tensors. autocast: float32 on a half-precision base."""
        device, dtype = self.kind.placement(self.get_base_layer(), self.backend)
        return {"device": device, "dtype": torch.float32 if autocast and dtype.itemsize < 4 else dtype}

    @torch.no_grad()
    def add_adapter(self, name, config, key="", *, autocast=True, empty=False):
        """Make adapter `name` on this layer.

        key: the layer's path in the model. autocast: float32 adapter weights on a half-precision base.
        empty: allocate on the meta device and skip the initialisation, for a loader that assigns the tensors.
        """
        if name in self.adapters:
            self.delete_adapter(name)
        adapter = self.adapter_cls.of(config, key)(self, name, key)
        if type(adapter) is not self.adapter_cls:
            _check_kind(self.kind, self.get_base_layer(), type(adapter))
        adapter.config = config
        where = self.placement(autocast)
        device = where["device"]
        adapter.build(config, {**where, "device": "meta"} if empty else where)
        for field_name in adapter.trained_shared:  # known here too, so that names and order are upstream's
            if field_name in self.shared:
                self._modules[field_name] = self.shared[field_name]
        self.adapters[name] = adapter
        self._changed()
        if not empty or device.type != "meta":
            adapter.derive(config)
        if not empty and device.type != "meta":
            adapter.reset(config)
        if not self.training:  # new modules are born in training mode
            for slots in [s for n, s in self._modules.items() if n in adapter.fields]:
                if (module := getattr(slots, "_modules", {}).get(name)) is not None:
                    _to_eval(module)
        adapter.frozen = config.inference_mode
        adapter.set_trainable(name in self.state.active and not adapter.frozen)
        for field in adapter.frozen_fields():
            for slot in adapter.fields[field].slots_of(adapter):
                slot.tensor.requires_grad = False
        self.kind.added(self, name, config, autocast=autocast, empty=empty)

    def delete_adapter(self, name):
        """Remove an adapter; raises AdapterError while it is merged."""
        if name in self.merged_adapters:
            raise AdapterError(f"Adapter {name!r} is merged into the base layer; unmerge it before deleting it.")
        if (adapter := self.adapters.pop(name, None)) is None:
            return
        for field_name, field in adapter.fields.items():
            if field.shared:  # the tuner takes the entry away
                if not self.adapters:
                    self._modules.pop(field_name, None)
                continue
            slots = self.__dict__[field_name] if field.container is None else self._modules.get(field_name)
            if slots is not None and name in slots:
                del slots[name]
                if field.container is not None and not len(slots):
                    del self._modules[field_name]
        self._changed()
        if name in self.state.active and isinstance(self.state, Stray):
            self.state.active = tuple(n for n in self.state.active if n != name)

    def _changed(self):
        """Forget what was computed for the adapters as they were."""
        self.__dict__.update(_live=(None, ()), _present=tuple(self.adapters), folded=None)
        self.banks.clear()

    def live(self):
        """The adapters that act in a forward without adapter_names, in order."""
        active = self.state.active
        if torch.compiler.is_compiling():
            return [self.adapters[n] for n in active if n in self.adapters]
        cached = self._live
        if cached[0] is not active:
            self._live = cached = (active, [self.adapters[n] for n in active if n in self.adapters])
        return cached[1]

    @property
    def active_adapters(self):
        return list(self.state.active)

    active_adapter = _active_adapter = active_adapters

    _disable_adapters = Switchable.disable_adapters

    def set_adapter(self, adapter_names, inference_mode=False):
        """Switch this layer alone. Active adapters are trained, others not; inference_mode=True freezes all."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name, adapter in self.adapters.items():
            adapter.set_trainable(name in names and not inference_mode and not adapter.frozen)
        self._stray(names, self.state.enabled)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Train adapters, or freeze them, whether they are active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters:
                self.adapters[name].frozen = not requires_grad
                self.adapters[name].set_trainable(requires_grad)

    def _get_available_adapters(self):
        return set(self.adapters)

    _all_available_adapter_names = _get_available_adapters

    # -- forward -------------------------------------------------------------------------------------------------
    def forward(self, x, *args, **kwargs):
        state = self.state
        if state.calls and state.enabled and (call := state.call()) is not None and call.names is not None:
            return self._forward_call(call, x, *args, **kwargs)
        if state.block is not None and state.enabled:
            return compose.forward(self, state.block, x, *args, **kwargs)
        if self._undo or not state.enabled:
            merged = self.merged_adapters
            if not state.enabled:
                if merged:
                    self.unmerge()
            elif rest := [a for a in self.live() if a.name not in merged]:
                return self.kind.call(self, rest, x, *args, **kwargs)
            return self.kind.plain(self, x, *args, **kwargs)
        return self.kind.call(self, self.live(), x, *args, **kwargs)

    def _forward_call(self, call, x, *args, **kwargs):
        """A forward that chooses its adapters itself."""
        if self._undo:
            raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please unmerge first.")
        plan = call.rows(x.shape[0], self._present, x.device)
        if isinstance(plan, str):
            return self.kind.call(self, [self.adapters[plan]], x, *args, **kwargs)
        if not plan.rows:
            return self.kind.plain(self, x, *args, **kwargs)
        if not self.adapter_cls.by_row:
            raise AdapterError(
                f"adapter_names cannot choose an adapter per sample here: what {self.adapter_cls.__name__} does to a "
                "sample depends on the others of its batch. Run one batch per adapter."
            )
        return self.kind.mixed(self, plan, x, *args, **kwargs)

    # -- merge ---------------------------------------------------------------------------------------------------
    @property
    def merged_adapters(self):
        return [name for name, *_ in self._undo]

    @property
    def merged(self):
        return bool(self._undo)

    def adapted_weight(self, adapters, W):
        """What the canonical base weight W becomes under these adapters, in float32 or better."""
        new = W0 = W if W.dtype == torch.float64 else W.float()
        for i, a in enumerate(adapters):
            new = new + a.delta(W0) if a.parallel and i else a.merged_weight(new)
        return new

    def merge(self, safe_merge=False, adapter_names=None):
        """Put adapters (default: the active ones) into the base weight.

        The replaced weight is kept, so `unmerge` is exact. Raises MergeError, before anything is written, where the
        result is not finite though the base weight is (safe_merge=True: wherever it is not finite).
        """
        for name in self._mergeable(adapter_names):
            self._undo.append((name, *self.kind.merge(self, self.adapters[name], safe_merge)))

    def merge_weight(self, adapter, safe_merge):
        """Put one adapter into the base weight and bias; returns those that they replace."""
        base, param, backend = self.get_base_layer(), self.kind.param, self.backend
        packed, bias = backend.get(base, param), getattr(base, "bias", None)
        with torch.no_grad():
            W, W0 = self.kind.canon(backend.unpack(base, packed)), self.base_weight()
            if backend.lossy and self._undo:  # all from the pristine weight, so that it is rounded only once
                merged = self.adapted_weight([*(self.adapters[n] for n in self.merged_adapters), adapter], W0)
            elif adapter.parallel and self._undo:
                merged = W.float() + adapter.delta(W0.float())
            else:
                merged = self.adapted_weight([adapter], W)
            new_bias = adapter.merged_bias(None if bias is None else bias.detach(), W0)
            merged = merged.to(W.dtype)
            check_finite(merged, W, safe_merge, adapter.name, adapter.key or type(base).__name__)
            new_packed = backend.pack(base, self.kind.uncanon(merged), packed)
        backend.put(base, param, new_packed)
        if new_bias is not None and new_bias is not bias and (bias is None or new_bias.data_ptr() != bias.data_ptr()):
            dtype = merged.dtype if bias is None else bias.dtype
            _set_bias(base, nn.Parameter(new_bias.to(dtype), requires_grad=False))
        return packed, bias

    def put_back_weight(self, packed, bias):
        """Undo `merge_weight`."""
        base = self.get_base_layer()
        self.backend.put(base, self.kind.param, packed)
        if getattr(base, "bias", None) is not bias:
            _set_bias(base, bias)

    def _mergeable(self, names):
        names = self.state.active if names is None else names
        if isinstance(names, str):
            raise TypeError(f"adapter_names must be a list of names, got the str {names!r}; write [{names!r}].")
        merged = self.merged_adapters
        if merged:
            fresh = [n for n in names if n not in merged]
            if fresh:
                warnings.warn(
                    f"{', '.join(merged)} is merged already; {', '.join(fresh)} is merged on top of it.",
                    stacklevel=3,
                )
            elif names:
                warnings.warn("These adapters are merged already; nothing to do.", stacklevel=3)
            names = fresh
        return [n for n in names if n in self.adapters]

    def unmerge(self, keep=0):
        """Put back, bit for bit, what the merges replaced; the first `keep` of them stay."""
        if not self._undo:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
        while len(self._undo) > keep:
            _, *kept = self._undo.pop()
            self.kind.unmerge(self, *kept)

    def _apply(self, fn, recurse=True):
        """`.to()` and friends also reach what a merge has put aside."""
        super()._apply(fn, recurse)
        with torch.no_grad():
            self._undo = [(n, *(_moved(kept, fn) for kept in replaced)) for n, *replaced in self._undo]
        self.banks.clear()
        return self

    def forget_merge(self):
        """Make a merge final: what it replaced is dropped."""
        self._undo.clear()

    def get_delta_weight(self, adapter):
        """What merging the adapter adds to the base weight, in the module's own layout."""
        with torch.no_grad():
            return self.kind.uncanon(self.adapters[adapter].delta(self.base_weight().float()))

    def supports_lora_conversion(self, adapter_name="default"):
        """Whether a linear layer's LoRA may come close to the adapter; for a name that is not here, to the method's
        own kind."""
        return self.kind.name == "linear" and self.adapters.get(adapter_name, self.adapter_cls).converts

    def _get_name(self):
        kind = "ParamWrapper" if self.kind.name == "param" else type(self.get_base_layer()).__name__
        return f"{self.adapter_cls.prefix.rstrip('_')}.{kind}"


def _check_kind(kind, base, adapter_cls):
    if kind is None or kind.name not in adapter_cls.kinds:
        raise ConfigError(
            f"Target module {base} is not supported: {adapter_cls.__name__} adapts layers of the kinds "
            f"{', '.join(adapter_cls.kinds)}. Choose its sub-layers in target_modules instead."
        )


def check_finite(merged, W, safe_merge, name, where):
    """Raise MergeError where merging adapter `name` into W gives infinity or NaN (safe_merge: also if W had them)."""
    if not_finite(merged) and (safe_merge or not not_finite(W)):
        raise MergeError(
            f"NaNs detected in the merged weights. The adapter {name} seems to be broken: merging it into {where} "
            "gives values that are not finite."
        )


def _moved(kept, fn):
    """What a merge has put aside after `fn`; what a quantization library keeps moves with that library's own means."""
    if isinstance(kept, dict):
        return {k: fn(t) if type(t) is torch.Tensor else _moved(t, fn) for k, t in kept.items()}
    return nn.Parameter(fn(kept.data), kept.requires_grad) if type(kept) is nn.Parameter else kept


def _set_bias(base, bias):
    """Replace the bias where the layer keeps it: some quantized layers have it in a plain attribute."""
    (base.__dict__ if "bias" in base.__dict__ else base._parameters)["bias"] = bias


def _to_eval(module):
    if module._modules:
        module.eval()
    else:
        module.__dict__["training"] = False
