"""The contract of a layer kind: everything the house knows about one type of base layer."""

import torch


class Kind:
    """One base layer type. `base` is always the wrapped module, `layer` the AdapterLayer around it.

    Weights that methods see are canonical: (out, in, *kernel), whatever the layout in the module.
    """

    name = ""
    param = "weight"
    composes = True  # adapters change what the layer returns, so that compositions can combine those changes

    @staticmethod
    def owns(base):
        """Whether this kind knows modules like `base`."""
        raise NotImplementedError

    def shape(self, base):
        """(out, in, *kernel) of the canonical weight."""
        raise NotImplementedError

    def canon(self, W):
        """Storage layout -> (out, in, *kernel)."""
        return W

    def uncanon(self, W):
        return W

    def unquantized(self, base):
        """The kind of the float layer that a quantized base was made from, by which files hold its weight."""
        return self

    def op(self, base, x, W):
        """The base operation with canonical weight W and no bias."""
        raise NotImplementedError

    def placement(self, base, backend):
        """(device, dtype) for new adapter tensors."""
        return backend.placement(base, self.param)

    def per_out(self, v):
        """Reshape a vector of `out` numbers so that it broadcasts against the layer's output."""
        return v.flatten()

    per_in = per_out

    def factors(self, base, r, bias, **where):
        """Uninitialised modules (A: in -> r, B: r -> out) for low-rank methods. `where`: device and dtype."""
        raise NotImplementedError

    def factor_delta(self, A, B):
        """The canonical weight that `B(A(x))` amounts to, from the factors' weights."""
        raise NotImplementedError

    def attach(self, layer):
        """Called once when `layer` wraps its base."""

    def detach(self, layer):
        """Undo `attach`; called on unload."""

    def added(self, layer, name, config, **how):
        """Called after adapter `name` was built on `layer`."""

    def call(self, layer, active, x, *args, **kwargs):
        """The adapted forward: x through each adapter's input, the base layer, y through each adapter's output.

        The last adapter's input comes first: then each acts on the layer as the ones before it made it, as in a merge.
        """
        h = x
        for a in reversed(active):
            h = a.input(h)
        y = layer.base_layer(h if h is x else h.to(x.dtype), *args, **kwargs)
        y, dtype = layer.backend.guard(y), y.dtype
        merged = layer.merged
        y0 = layer.pristine(x) if merged else y
        for i, a in enumerate(active):
            y = a.beside(x, y, y0) if i or merged else a.output(x, y)
        return y.to(dtype)

    def parted(self, returned):
        """(y, a function that gives the base layer's return value with another y) of what the base layer returned."""
        return returned, lambda y: y

    def merge(self, layer, adapter, safe_merge):
        """Put an adapter into the base layer; returns the two things that `unmerge` takes back."""
        return layer.merge_weight(adapter, safe_merge)

    def unmerge(self, layer, packed, bias):
        layer.put_back_weight(packed, bias)

    def plain(self, layer, x, *args, **kwargs):
        """What the base layer alone makes of x."""
        return layer._modules["base_layer"](x, *args, **kwargs)  # not .base_layer: that look-up costs a microsecond

    def mixed(self, layer, plan, x, *args, **kwargs):
        """Rows of one batch to different adapters. Right for every method whose input and output act row by row."""
        y, whole = self.parted(layer.base_layer(self.inputs_by_row(layer, plan, x), *args, **kwargs))
        return whole(self.outputs_by_row(layer, plan, x, y))

    @staticmethod
    def inputs_by_row(layer, plan, x):
        """x with each planned row changed by the input of its own adapter."""
        h = x
        for name, rows in plan.rows.items():
            a = layer.adapters[name]
            if a.changes_input:
                h = h.clone() if h is x else h
                h[rows] = a.input(x[rows]).to(h.dtype)
        return h

    @staticmethod
    def outputs_by_row(layer, plan, x, y):
        """y with each planned row changed by the output of its own adapter."""
        out, call = y.clone(), layer.state.call()
        for name, rows in plan.rows.items():
            call.part = rows, len(x)
            out[rows] = layer.adapters[name].output(x[rows], y[rows]).to(y.dtype)
        call.part = None
        return out


def bare(cls, attributes, **tensors):
    """A torch layer with given attributes and parameters (None: absent), skipping the initialisation of `cls`."""
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    module.__dict__.update(attributes)
    for name, t in tensors.items():
        module._parameters[name] = None if t is None else torch.nn.Parameter(t)
    return module
