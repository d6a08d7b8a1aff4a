"""LoRA, W + s·BA (arXiv 2106.09685), and DoRA, which scales its rows to a trained magnitude (arXiv 2402.09353)."""

import warnings

import torch
from packaging.version import Version
from torch import nn

from peft.core import match
from peft.core.adapter import Additive, Derived, Mod, Param, Slot, Val, dropout_rate
from peft.core.layer import AdapterLayer
from peft.errors import ConfigError, PeftWarning
from peft.methods.lora import inits, variants
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.ops.sources import stamp

# Up to this release, upstream added the update of an attention layer's out_proj twice; its adapters were trained so.
DOUBLED_OUT_PROJ = Version("0.21.2")
TINY = torch.finfo(torch.float32).tiny  # the norm of a row of zeros, which some models have: 0 / 0 would be NaN


class DoraMagnitude(nn.Module):
    """The trained length of each row: weight (out,), shaped to broadcast against the layer's output."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Lora(Additive):
    """y + s·B(A(dropout(x))); with a magnitude m, rows of W + s·BA are rescaled to length m."""

    prefix = "lora_"
    kinds = ("linear", "conv", "embedding", "param", "mha")
    renames = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}

    lora_dropout = Mod(trainable=False)
    lora_A, lora_B = Mod(), Mod()  # in -> r, r -> out
    lora_embedding_A, lora_embedding_B = Param(), Param()  # (r, vocabulary), (dim, r)
    lora_magnitude_vector = Mod()  # DoRA only
    lora_start_A, lora_start_B = Derived(), Derived()  # (r, in), (out, r): the subtracted start of pissa and olora
    r, lora_alpha, scaling, use_rslora, use_dora, lora_bias = Val(), Val(), Val(), Val(), Val(), Val()

    title = "LoRA"
    converts = True
    norms = (None, (), None)  # (what it was computed from, the factors' values then, row norms of W + s·BA)
    base_norms = (None, None)
    twin = None  # the embedding's adapter whose factors this one, on the tied head, reads transposed
    mode = True
    loftq_start = None  # (A0, B0), from `derive` until `reset`

    # -- making --------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, c, key):
        return c.variant or cls

    def build(self, c, where):
        self.r, self.lora_alpha, self.scaling = self.scale_of(c)
        self.use_rslora, self.use_dora, self.lora_bias = c.use_rslora, c.use_dora, c.lora_bias
        self.mode = c.init_lora_weights
        self._check_layer(c)
        if c.lora_dropout:
            self.lora_dropout = nn.Dropout(c.lora_dropout)
        A, B = self.kind.factors(self.base, self.r, c.lora_bias, **where)
        if self.kind.name == "embedding":
            self.lora_embedding_A, self.lora_embedding_B = A, B
        else:
            self.lora_A, self.lora_B = A, B
        if c.use_dora:
            out = torch.empty(self.layer.shape[0], **where)
            self.lora_magnitude_vector = DoraMagnitude(out.reshape(self.kind.per_out(out).shape))

    def scale_of(self, c):
        """(r, lora_alpha, scaling) that a config gives this layer."""
        r = match.pattern_value(c.rank_pattern, self.key, c.r)
        alpha = match.pattern_value(c.alpha_pattern, self.key, c.lora_alpha)
        doubled = self.layer.owned and Version(c.peft_version or "0") <= DOUBLED_OUT_PROJ
        return r, alpha, float(c.scaling(r, alpha)) * (2 if doubled else 1)

    def _check_layer(self, c):
        if type(self.kind).__name__ == "Conv1D" and not c.fan_in_fan_out:
            warnings.warn(
                f"{self.key} is a Conv1D, stored transposed: fan_in_fan_out becomes True in the config.",
                stacklevel=8,
            )
            c.fan_in_fan_out = True
        if self.kind.name in ("param", "mha"):
            unfit = [n for n in ("lora_bias", "use_dora", "fan_in_fan_out") if getattr(c, n)]
            unfit += ["lora_dropout"] if c.lora_dropout and self.kind.name == "param" else []
            if unfit:
                raise ConfigError(
                    f"{unfit[0]} does not work for {self.key}: the layer reads its weight itself, so LoRA can only "
                    f"change that weight. Leave {unfit[0]} at its default for target_parameters and attention modules."
                )
        if self.kind.name == "embedding" and c.lora_bias:
            raise ConfigError(f"lora_bias=True is not supported for the embedding {self.key}.")
        if c.use_dora and self.kind.name == "conv" and getattr(self.base, "groups", 1) > 1:
            raise ConfigError(f"use_dora=True is not supported for {self.key}: it is a convolution with groups.")

    def derive(self, c):
        if self.mode in (True, False) or self.layer.base_layer is None:
            return
        if self.mode == "loftq":
            from peft.methods.lora import loftq

            self.loftq_start = loftq.start(self, c)
            return
        W = self.base_weight()
        if self.mode in inits.FROM_DATA:
            start = inits.from_data(self.mode, self.base, W.float(), self.r, self.scaling, c)
        else:
            start = inits.subtracted(self.mode, W, self.r, self.scaling) if W.ndim == 2 else None
        if start is not None:
            like = self.factors()[0]
            self.lora_start_A, self.lora_start_B = (t.to(W.device, like.dtype) for t in start)

    def reset(self, c):
        A, B = self.factors()
        if self.lora_start_A is not None:
            A.copy_(self.lora_start_A)
            B.copy_(self.lora_start_B)
        elif self.loftq_start is not None:
            A.copy_(self.loftq_start[0])
            B.copy_(self.loftq_start[1])
            self.loftq_start = None
        elif self.mode == "loftq":
            warnings.warn(
                f"{self.key} is quantized already, so A and B start as usual. replace_lora_weights_loftq(model) sets "
                "them to what the quantization took away.",
                PeftWarning,
                stacklevel=8,
            )
            inits.initialise(True, A, B, self.base_weight, c)
        elif self.mode in inits.FROM_DATA:
            raise ConfigError(
                f"init_lora_weights={self.mode!r} starts {self.key} from data, but none was collected for it. Call "
                f"preprocess_{self.mode.replace('_', '')}(model, config, ...) before get_peft_model."
            )
        elif self.kind.name == "embedding" and self.mode is True:
            A.zero_()  # the other way round than elsewhere: a lookup in A is cheap to make zero
            B.normal_()
        elif self.kind.name == "embedding" and self.mode is False:
            A.normal_()
            B.normal_()
        else:
            mode = True if self.mode in ("pissa", "olora") or str(self.mode).startswith("pissa_") else self.mode
            inits.initialise(mode, A, B, self.base_weight, c)
        if self.lora_bias and self.lora_B is not None:
            bound = A.shape[0] ** -0.5
            self.lora_B.bias.zero_() if self.mode else self.lora_B.bias.uniform_(-bound, bound)
        if self.lora_magnitude_vector is not None:
            magnitude = self.lora_magnitude_vector.weight
            magnitude.copy_(self._row_norms().reshape(magnitude.shape))

    def frozen_fields(self):
        """MiCA trains A alone."""
        return ("lora_B", "lora_embedding_B") if self.mode == "mica" else ()

    @classmethod
    def tie(cls, layer, source, name, key):
        """Make adapter `name` on the tied layer `layer` read the factors of `source`, transposed."""
        twin = source.adapters[name]
        adapter = cls(layer, name, key)
        for value in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias"):
            setattr(adapter, value, getattr(twin, value))
        if adapter.use_dora:
            raise ConfigError("ensure_weight_tying=True is not supported with use_dora=True.")
        adapter.twin, adapter.frozen = twin, twin.frozen
        layer.adapters[name] = adapter
        layer._changed()

    # -- reading -------------------------------------------------------------------------------------------------
    def factors(self):
        """The weights (A, B) that are trained: A (r, in, *kernel), B (out, r, ...)."""
        if self.twin is not None:
            A, B = self.twin.factors()
            return B.t(), A.t()
        if (A := self.lora_A) is not None:
            return A.weight, self.lora_B.weight
        return self.lora_embedding_A, self.lora_embedding_B

    def places(self, skip=()):
        return super().places(skip) if self.twin is None else self.twin.places(skip)

    def effective_factors(self):
        """(A, B) with the subtracted start, if there is one, as further rank."""
        A, B = self.factors()
        if (start := self.lora_start_A) is not None:
            A, B = torch.cat([A, start.to(A.dtype)]), torch.cat([B, -self.lora_start_B.to(B.dtype)], dim=1)
        return A, B

    @classmethod
    def from_file(cls, c, tensors, adapters):
        """Files of starts from data hold twice the rank, the second half being the start: see `plain.plain_form`."""
        tensors = dict(tensors)
        for adapter in adapters if c.init_lora_weights in inits.FROM_DATA else ():
            keys = [k for k in tensors if k.endswith((f"{adapter.key}.lora_A.weight", f"{adapter.key}.lora_B.weight"))]
            if len(keys) == 2 and tensors[min(keys)].shape[0] == 2 * adapter.r:
                (A, A0), (B, B0) = tensors[min(keys)].chunk(2), tensors[max(keys)].chunk(2, dim=1)
                tensors[min(keys)], tensors[max(keys)] = A, B
                like = adapter.factors()[0]
                device = adapter.base_device
                adapter.lora_start_A, adapter.lora_start_B = (t.to(device, like.dtype) for t in (A0, -B0))
        return tensors

    def saved_slots(self):
        if self.twin is None:
            return super().saved_slots()
        A, B = self.factors()
        return [Slot(f"lora_A.{self.name}.weight", A.contiguous()), Slot(f"lora_B.{self.name}.weight", B.contiguous())]

    def delta_weight(self):
        A, B = self.effective_factors()
        return self.kind.factor_delta(A, B) * self.scaling

    # -- computing -----------------------------------------------------------------------------------------------
    def low_rank(self):
        modules = self.layer._modules
        if self.twin is not None or self.lora_start_A is not None or "lora_A" not in modules:
            A, B = self.effective_factors()
            bias = None
        else:  # the plain case, written for the interpreter: this runs in every forward of every layer
            A = modules["lora_A"]._modules[self.name]._parameters.get("weight")
            parameters = modules["lora_B"]._modules[self.name]._parameters
            B, bias = parameters.get("weight"), parameters.get("bias")
            if A is None or B is None:
                return None
        return self.pair(A, B, bias)

    def pair(self, A, B, bias):
        """These factors with the scaling, dropout and magnitude of this adapter."""
        modules = self.layer._modules
        drop = modules.get("lora_dropout")
        drop = drop._modules.get(self.name) if drop is not None else None
        p = dropout_rate(drop)
        scale = None
        if "lora_magnitude_vector" in modules and (m := self.lora_magnitude_vector) is not None:
            scale = m.weight / self._row_norms()
        return LowRank(A, B, self.layer.__dict__["scaling"][self.name], p, bias, scale)

    def native_scaling(self):
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def output(self, x, y):
        if self.kind.name == "linear" and (f := self.low_rank()) is not None:
            return lowrank.add(self.base, y, x, f)
        update = self._update(x)
        if self.lora_magnitude_vector is None:
            return y + update.to(y.dtype)
        scale = self.lora_magnitude_vector.weight / self.kind.per_out(self._row_norms())
        bias = getattr(self.base, "bias", None)
        bias = 0 if bias is None else self.kind.per_out(bias)
        return (y - bias + update) * scale + bias

    def beside(self, x, y, y0):
        return self.output(x, y) if self.lora_magnitude_vector is None else super().beside(x, y, y0)

    def _update(self, x):
        """s·B(A(x)) where A and B are modules or lookups."""
        if self.kind.name == "embedding":
            A, B = self.effective_factors()
            after_A = self.kind.lookup(self.base, x, A.t())
            return self.kind.scaled(self.base, after_A @ B.t()) * self.scaling
        drop = self.lora_dropout
        x = x if drop is None else drop(x)
        if self.layer.cast_input_dtype_enabled and not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(self.lora_A.parameters()).dtype)  # A may be wrapped by FSDP, and then has no weight
        return self.lora_B(self.lora_A(x)) * self.scaling

    def _row_norms(self):
        """‖W + s·BA‖ of each row, float32, (out,). Kept between forwards without gradients until a tensor changes.

        A forward with gradients computes it anew: optimizers may write through pointers, and no version counter moves.
        """
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return self._compute_norms(*self.effective_factors(), self.base_weight())
            factors = self.factors()
            packed = self.layer.backend.get(self.base, self.kind.param) if not self.layer.merged else None
            now = (*map(stamp, factors), stamp(packed), self.scaling)
            kept, values, norms = self.norms
            if learning or kept != now or not all(map(torch.equal, factors if values else (), values)):
                norms = self._compute_norms(*self.effective_factors(), self.base_weight(), stamp(packed))
                values = [t.clone() for t in factors if t.device.type == "cpu"]  # elsewhere comparing costs a wait
                self.norms = (None, (), None) if learning else (now, values, norms)
            return norms

    def _compute_norms(self, A, B, W, base_stamp=None):
        if W.ndim > 2:
            V = W.float() + self.kind.factor_delta(A.float(), B.float()) * self.scaling
            return V.flatten(1).norm(dim=1).clamp(min=TINY)
        if base_stamp is None or self.base_norms[0] != base_stamp:
            self.base_norms = (base_stamp, W.float().square().sum(1))
        return lowrank.frobenius_rows(W, A, B, self.scaling, self.base_norms[1]).clamp(min=TINY)

    # -- merging -------------------------------------------------------------------------------------------------
    def delta(self, W):
        return super().delta(W) if self.lora_magnitude_vector is None else self.merged_weight(W) - W

    def merged_weight(self, W):
        if W.ndim == 2:
            A, B = self.effective_factors()
            V = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=self.scaling)
        else:
            V = W + self.delta_weight().to(W.dtype)
        if self.lora_magnitude_vector is None:
            return V
        scale = self.lora_magnitude_vector.weight.flatten() / V.flatten(1).norm(dim=1).clamp(min=TINY)
        return V * scale.view(-1, *[1] * (V.ndim - 1)).to(V.dtype)

    def merged_bias(self, b, W):
        extra = None if self.lora_B is None else getattr(self.lora_B, "bias", None)
        if extra is None:
            return b
        extra = extra * self.scaling
        return extra if b is None else b + extra.to(b.dtype)


class LoraLayer(AdapterLayer):
    """A base layer with LoRA adapters."""

    adapter_cls = Lora

    @property
    def lora_variant(self):
        """{name: adapter} of the adapters that are a variant of LoRA; `variants` has classes for isinstance."""
        return {name: adapter for name, adapter in self.adapters.items() if variants.title(adapter)}

    def __getattr__(self, name):
        if name == "lora_dropout" and "lora_dropout" not in self._modules:
            return nn.ModuleDict({n: nn.Identity() for n in self.adapters})
        return super().__getattr__(name)
