"""What bottleneck adapters compute: on a layer, at the module whose input they read, and after the embedding."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from peft.core import match
from peft.core.adapter import Adapter, Mod, Param, Val, through
from peft.core.hidden_states import HiddenStatesLayer
from peft.errors import AdapterError, ConfigError
from peft.layers.block import output_width
from peft.layers.linear import linear
from peft.methods.bottleneck import hypercomplex
from peft.methods.bottleneck.activations import ACTIVATIONS
from peft.methods.bottleneck.invertible import Coupling


class Bottleneck(Adapter):
    """y + s·U f(D z), where z is the layer's output y, its input x (or another module's), or their sum."""

    prefix = "bottleneck_"
    kinds = ("linear", "sublayer")
    parallel = False
    folds = False

    bottleneck_norm_before = Mod()  # of z's width
    bottleneck_down = Mod()  # (size, width of z); Kronecker terms of as many numbers as they need
    bottleneck_up = Mod()  # (out, size)
    bottleneck_down_rule, bottleneck_up_rule = Mod(), Mod()  # (n, n, n)
    bottleneck_down_bias, bottleneck_up_bias = Param(), Param()  # (size,), (out,), of Kronecker projections
    bottleneck_norm_after = Mod()  # (out,)
    bottleneck_gate = Mod()  # (1, width of z)
    bottleneck_scale = Param()  # (1,) or (out,)
    bottleneck_dropout = Mod(trainable=False)
    bottleneck_coupling = Mod()  # of the embedding
    bottleneck_rule = Mod(shared=True)  # (n, n, n)
    bottleneck_shared_down, bottleneck_shared_up = Mod(shared=True), Mod(shared=True)
    bottleneck_size, bottleneck_width = Val(), Val()  # of the bottleneck, of z
    bottleneck_index = Val()  # of the layer in the model
    bottleneck_tap = Val()  # key of the module whose input is read in place of the layer's
    bottleneck_feeds = Val()  # keys of the layers that read what this one gets

    @classmethod
    def of(cls, c, key):
        if match.Names(c.invertible_modules).match(key):
            return Invertible
        return Tap if match.Names((c.tap_modules or {}).values()).match(key) else cls

    # -- making --------------------------------------------------------------------------------------------------
    @classmethod
    def share(cls, c, layers, where):
        shared = {}
        if c.phm_dim and c.phm_shared_rule:
            shared["bottleneck_rule"] = hypercomplex.rule(c, where)
            shared["bottleneck_rule"].fill(1 / c.phm_dim)
        if c.phm_dim and c.phm_shared_weights:
            sizes = {_sizes(layer, c, key): key for key, layer in layers.items()}
            if len(sizes) > 1:
                raise ConfigError(
                    "phm_shared_weights needs layers of one size, but (input, bottleneck, output) are "
                    + ", ".join(f"{size} on {key}" for size, key in sizes.items())
                    + "."
                )
            for (inp, size, out), key in sizes.items():
                shared["bottleneck_shared_down"] = hypercomplex.terms(c, inp, size, key, where)
                shared["bottleneck_shared_up"] = hypercomplex.terms(c, size, out, key, where)
            shared["bottleneck_shared_down"].fill(1 / (3 * inp))
            _start(shared["bottleneck_shared_up"], c, 1 / (3 * size))
        return shared

    def build(self, c, where):
        inp, size, out = _sizes(self.layer, c, self.key)
        self.bottleneck_size, self.bottleneck_width = size, inp
        self.bottleneck_index = match.layer_index(self.key, c.layers_pattern)
        self.bottleneck_tap = tap_of(c, self.key)
        if c.norm_before:
            self.bottleneck_norm_before = nn.LayerNorm(inp, **where)
        if c.phm_dim:
            self._build_hypercomplex(c, inp, size, out, where)
        else:
            self.bottleneck_down, self.bottleneck_up = (
                linear(inp, size, True, **where),
                linear(size, out, True, **where),
            )
        if c.norm_after:
            self.bottleneck_norm_after = nn.LayerNorm(out, **where)
        if c.gating:
            self.bottleneck_gate = linear(inp, 1, True, **where)
        if isinstance(c.scaling, str):
            self.bottleneck_scale = nn.Parameter(torch.empty(1 if c.scaling == "learned" else out, **where))
        if c.dropout:
            self.bottleneck_dropout = nn.Dropout(c.dropout)

    def _build_hypercomplex(self, c, inp, size, out, where):
        if not c.phm_shared_weights:
            self.bottleneck_down = hypercomplex.terms(c, inp, size, self.key, where)
            self.bottleneck_up = hypercomplex.terms(c, size, out, self.key, where)
        if not c.phm_shared_rule:
            self.bottleneck_down_rule, self.bottleneck_up_rule = (hypercomplex.rule(c, where) for _ in range(2))
        if c.phm_bias:
            self.bottleneck_down_bias = nn.Parameter(torch.empty(size, **where))
            self.bottleneck_up_bias = nn.Parameter(torch.empty(out, **where))

    def reset(self, c):
        for norm in (self.bottleneck_norm_before, self.bottleneck_norm_after):
            if norm is not None:
                norm.reset_parameters()
        if self.bottleneck_gate is not None:
            _like_linear(self.bottleneck_gate)
        if self.bottleneck_scale is not None:
            self.bottleneck_scale.fill_(1)
        for bias in (self.bottleneck_down_bias, self.bottleneck_up_bias):
            if bias is not None:
                bias.zero_()
        for rules in (self.bottleneck_down_rule, self.bottleneck_up_rule):
            if rules is not None:
                rules.fill(1 / c.phm_dim)
        if self.bottleneck_down is not None and c.phm_dim:
            self.bottleneck_down.fill(1 / (3 * self.bottleneck_width))
            _start(self.bottleneck_up, c, 1 / (3 * self.bottleneck_size))
        elif self.bottleneck_down is not None:
            _start_dense(self.bottleneck_down, self.bottleneck_up, c)

    def frozen_fields(self):
        rules = ("bottleneck_rule", "bottleneck_down_rule", "bottleneck_up_rule")
        return () if self.config.phm_learn_rule else rules

    # -- computing -----------------------------------------------------------------------------------------------
    def projections(self):
        """(D, d, U, u): weights and biases of the way down and up; biases may be None."""
        c = self.config
        if not c.phm_dim:
            down, up = self.bottleneck_down, self.bottleneck_up
            return down.weight, down.bias, up.weight, up.bias
        rules = (
            [self.bottleneck_rule] * 2 if c.phm_shared_rule else [self.bottleneck_down_rule, self.bottleneck_up_rule]
        )
        pair = [self.bottleneck_down, self.bottleneck_up]
        if c.phm_shared_weights:
            pair = [self.bottleneck_shared_down, self.bottleneck_shared_up]
        D, U = (hypercomplex.kronecker(r.matrices(), t.matrices()) for r, t in zip(rules, pair))
        return D, self.bottleneck_down_bias, U, self.bottleneck_up_bias

    def output(self, x, y):
        c = self.config
        z = self.read(x, y)
        if self.rests():
            return y
        if z.shape[-1] != self.bottleneck_width:
            raise AdapterError(
                f"The bottleneck on {self.key} was made for {self.bottleneck_width} features, but gets {z.shape[-1]}. "
                "Name the width in BottleneckConfig.hidden_size, or choose another module."
            )
        update = self.update(z, y if c.residual_before_norm else None).to(y.dtype)
        if c.renorm:
            return self.kind.plain(self.layer, x + update)
        return update if c.residual_before_norm else y + update

    def rests(self):
        """Whether this step of AdapterDrop leaves this layer's adapter out."""
        if not self.config.drop_first or not self.training or self.bottleneck_index is None:
            return False
        call = self.layer.state.call()
        return call is not None and self.bottleneck_index < call.arguments.get("resting", {}).get(self.name, 0)

    def read(self, x, y):
        """What goes into the bottleneck."""
        c = self.config
        if c.reads == "output":
            return y
        if self.bottleneck_tap is not None:
            x = self.layer.state.take((self.key, self.name))
            if x is None:
                raise AdapterError(
                    f"The bottleneck on {self.key} reads what {self.bottleneck_tap} gets, but that did not run before "
                    "it in this forward. tap_modules must name a module that does."
                )
        return x + y if c.reads == "both" else x

    def update(self, z, residual=None):
        """z (..., width) -> what is added to the layer's output (with a residual: what takes its place)."""
        c = self.config
        D, d, U, u = (None if t is None else t.to(z.dtype) for t in self.projections())
        h = z if self.bottleneck_norm_before is None else _norm(self.bottleneck_norm_before, z)
        h = through(self.bottleneck_dropout, F.linear(ACTIVATIONS[c.non_linearity](F.linear(h, D, d)), U, u))
        s = c.scaling if self.bottleneck_scale is None else self.bottleneck_scale.to(z.dtype)
        h = h if s is c.scaling and s == 1 else h * s
        if self.bottleneck_gate is not None:
            gate = torch.sigmoid(
                F.linear(z, self.bottleneck_gate.weight.to(z.dtype), self.bottleneck_gate.bias.to(z.dtype))
            )
            h = h * (gate.mean(1, keepdim=True) if gate.ndim > 2 else gate)
        h = h if residual is None else h + residual
        return h if self.bottleneck_norm_after is None else _norm(self.bottleneck_norm_after, h)


class Tap(Bottleneck):
    """Leaves its layer as it is, and hands what the layer gets to those that read it."""

    def build(self, c, where):
        self.bottleneck_feeds = []  # the tuner knows them

    def reset(self, c):
        pass

    def output(self, x, y):
        for key in self.bottleneck_feeds:
            self.layer.state.hand((key, self.name), x)
        return y


class Invertible(Bottleneck):
    """An invertible map of what the embedding returns; on the output embedding, its inverse on what that gets."""

    def build(self, c, where):
        width = _sizes(self.layer, c, self.key)[2]
        if width % 2:
            raise ConfigError(f"An invertible adapter splits its input in halves; {self.key} has a width of {width}.")
        affine = c.invertible == "glow"
        self.bottleneck_coupling = Coupling(width, c.invertible_reduction_factor, c.non_linearity, affine, **where)

    def reset(self, c):
        coupling = self.bottleneck_coupling
        for down, up in ((coupling.first_down, coupling.first_up), (coupling.second_down, coupling.second_up)):
            _start_dense(down, up, c)

    def output(self, x, y):
        return y if self.borrowed else self.bottleneck_coupling(y)

    def input(self, x):
        return self.bottleneck_coupling.inverse(x) if self.borrowed else x


def tap_of(c, key):
    """The key of the module whose input the adapter on `key` reads in place of its layer's; None: of no other."""
    ends = [end for end in c.tap_modules or () if f".{key}".endswith(f".{end}")]
    if not ends:
        return None
    end = max(ends, key=len)
    return key[: len(key) - len(end)] + c.tap_modules[end]


def _sizes(layer, c, key):
    """(width of z, of the bottleneck, of the layer's output)."""
    out = output_width(layer, c.hidden_size)
    if not out:
        raise ConfigError(
            f"How wide the output of {key} is cannot be told from the module. Set BottleneckConfig.hidden_size."
        )
    reads_own = layer.kind.name == "linear" and c.reads == "input" and tap_of(c, key) is None
    inp = layer.shape[1] if reads_own else out
    size = match.pattern_value(c.size_pattern, key, c.bottleneck_size)
    step = c.phm_dim or 1
    return inp, size or max(1, int(out // c.reduction_factor) // step) * step, out


def _norm(norm, x):
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _like_linear(module):
    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    bound = module.weight.shape[1] ** -0.5
    module.bias.uniform_(-bound, bound)


def _start_dense(down, up, c):
    """Fill the two layers of a bottleneck as config.init_weights says."""
    if c.init_weights in ("bert", "houlsby"):
        for module in (down, up):
            if c.init_weights == "bert":
                module.weight.normal_(0, 0.02)
            else:
                nn.init.trunc_normal_(module.weight, 0, 0.01, -0.02, 0.02)
            module.bias.zero_()
        return
    _like_linear(down)
    _like_linear(up)
    if c.init_weights:
        up.weight.zero_()
        up.bias.zero_()


def _start(up, c, variance):
    """The same for the terms of a hypercomplex projection, whose rules are of variance 1 / phm_dim."""
    if c.init_weights is True:
        up.zero()
    else:
        up.fill({"bert": 4e-4, "houlsby": 1e-4}.get(c.init_weights, variance))


class BottleneckLayer(HiddenStatesLayer):
    """A base layer or part of a model with bottleneck adapters."""

    adapter_cls = Bottleneck
