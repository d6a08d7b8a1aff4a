"""FRoD, U (S + diag ℓ) Vᵀ in W's place: V shared by all layers of a role, S sparse; S and ℓ trained (paper at AAAI).

U and the first ℓ solve U diag(ℓ) Vᵀ = W, so that a fresh adapter (S = 0) is the base.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Additive, BufferDict, Derived, Field, Mod, Param, Val, dropout_rate, through
from peft.core.declare import layer_class
from peft.core.defaults import FROD_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import CheckpointError, ConfigError
from peft.methods.frod_product import Places, Weight, product
from peft.ops.sources import stamp
from peft.registry import register

EXACT = 1e-5  # how far, of the largest weight, W may be from what U and V make of it


@dataclass
class FrodConfig(LayersConfig):
    """FRoD on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.FROD

    projection_prng_key: int = field(default=0, metadata={"help": "seed of the places of S"})
    save_projection: bool = field(default=True, metadata={"help": "keep V and the places of S in the file"})
    frod_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of the update"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "frod_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (S = 0), else at random"})
    sparse_rate: float = field(default=0.01, metadata={"help": "share of S, but for its diagonal, that is trained"})
    regularization_alpha: float = field(default=1e-3, metadata={"help": "ridge in the joint decomposition"})
    progressbar: bool = field(default=True, metadata={"help": "for upstream, which shows a bar while decomposing"})
    runtime_offload_base_weight: bool = field(
        default=False, metadata={"help": "for upstream, which can keep base weights on the CPU; here they stay"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "frod_dropout", 0, 1)
        check_range(self, "sparse_rate", 0, 1)
        check_range(self, "regularization_alpha", 0)


def role_of(key):
    """The name that the modules of all layers with the same part to play have in common."""
    *path, last = key.split(".")
    if not path or path[-1].isdigit():
        return last
    role = f"{path[-1]}_{last}"
    return "attention_output" if role == "output_dense" and path[-2:-1] == ["attention"] else role


def depth_of(key, otherwise):
    """The index of the layer that a module lies in."""
    path = key.split(".")
    after = path[path.index("layers") + 1 :][:1] if "layers" in path else []
    return next((int(part) for part in [*after, *path] if part.isdigit()), otherwise)


def basis(weights, ridge):
    """V (in, in) for the weights [(out, in)] of a role: what a joint decomposition of them all has in common."""
    stacked = torch.cat(weights)
    rows, size = stacked.shape
    if rows < size:
        return torch.linalg.svd(stacked, full_matrices=True)[2].T
    Q, R = torch.linalg.qr(stacked)
    eye = torch.eye(size, dtype=stacked.dtype)
    total = torch.zeros_like(eye)
    for q in Q.split([len(W) for W in weights]):
        total += torch.linalg.inv(q.T @ q + ridge * eye)
    return R.T @ torch.linalg.eigh(total / len(weights))[1]


def places_of(size, rate, generator):
    """(2, entries) rows and columns of a share `rate` of a matrix, none on its diagonal, in random order."""
    total = size * (size - 1)
    entries = min(int(size * size * rate), total)
    entries = max(entries, 1) if rate > 0 and total else entries
    chosen = torch.randperm(total, generator=generator)[:entries] if entries else torch.empty(0, dtype=torch.long)
    row, column = chosen // max(size - 1, 1), chosen % max(size - 1, 1)
    return torch.stack([row, column + (column >= row)])


def _by_role(saved):
    """Field of tensors by role, shared by all layers."""
    return Field(nn.ModuleDict, "_modules", trainable=False, saved=saved, shared=True)


class Frod(Additive):
    """y + (U (S + diag ℓ) Vᵀ − W) x, computed without W where the base layer need not be called."""

    prefix = "frod_"

    frod_dropout = Mod(trainable=False)
    frod_lambda_l, frod_lambda_s_values = Param(), Param()  # ℓ (in,), entries of S
    frod_V, frod_s_indices, frod_s_size = _by_role(True), _by_role(True), _by_role(True)  # (in, in), (2, entries), (2,)
    frod_U, frod_start = Derived(), Derived()  # (out, in), the first ℓ (in,)
    frod_places = Val(shared=True)  # {role: Places}
    frod_layers = Val(shared=True)  # {role: the layers that V is made of}
    role = Val()

    sound = (None, False)  # (stamps of W, V and U, whether U diag(first ℓ) Vᵀ is W)

    @classmethod
    def share(cls, c, layers, where):
        roles = {}
        for i, (key, layer) in enumerate(layers.items()):
            roles.setdefault(role_of(key), {})[depth_of(key, i)] = layer  # as upstream has it: the last of a depth
        generator = torch.Generator().manual_seed(c.projection_prng_key)
        V, indices, size, of = BufferDict(True), BufferDict(True), BufferDict(True), {}
        for role in sorted(roles):
            of[role] = [layer for _, layer in sorted(roles[role].items())]
            if len(sizes := {layer.shape[1] for layer in of[role]}) > 1:
                raise ConfigError(
                    f"FRoD shares one V among all {role!r}, but their inputs have {sorted(sizes)} numbers."
                )
            n, dtype = sizes.pop(), of[role][0].placement(autocast=False)["dtype"]
            V[role] = torch.empty(n, n, dtype=dtype, device="meta")  # costly: made when nothing else gives it
            indices[role] = places_of(n, c.sparse_rate, generator).to(where["device"])
            size[role] = torch.tensor([n, n], device=where["device"])
        fields = {"frod_V": V, "frod_s_indices": indices, "frod_s_size": size}
        return {**fields, "frod_places": {}, "frod_layers": of}

    @classmethod
    def unsaved(cls, c):
        return () if c.save_projection else ("frod_V", "frod_s_indices", "frod_s_size")

    @classmethod
    def from_file(cls, c, tensors, adapters):
        held = {k for k in tensors if k.rpartition(".")[0].endswith(("frod_V", "frod_s_indices", "frod_s_size"))}
        if c.save_projection and not held:
            raise CheckpointError(
                "The config says save_projection=True, but the file holds no frod_V. If it was left out on purpose, "
                "set save_projection=False in its adapter_config.json: V follows from the base model."
            )
        V = {k.rpartition(".")[2]: tensors[k] for k in held if ".frod_V." in f".{k}"}
        indices = {k.rpartition(".")[2]: tensors[k] for k in held if ".frod_s_indices." in f".{k}"}
        for a in adapters:
            a.decompose(c, V.get(a.role), indices.get(a.role))
        return tensors if c.save_projection else {k: v for k, v in tensors.items() if k not in held}

    def build(self, c, where):
        self.correct_layout(c)
        self.role = role_of(self.key)
        if c.frod_dropout:
            self.frod_dropout = nn.Dropout(c.frod_dropout)
        self.frod_lambda_l = nn.Parameter(torch.empty(self.layer.shape[1], **where))
        self.frod_lambda_s_values = nn.Parameter(torch.empty(self.frod_s_indices[self.role].shape[1], **where))

    def reset(self, c):
        if self.frod_U is None:
            self.decompose(c)
        self.frod_lambda_l.copy_(self.frod_start)
        self.frod_lambda_s_values.zero_()
        if not c.init_weights:
            self.frod_lambda_s_values.normal_(std=0.1)
            self.frod_lambda_l.add_(torch.randn_like(self.frod_lambda_l), alpha=0.1)

    @torch.no_grad()
    def decompose(self, c, V=None, indices=None):
        """Compute U and the first ℓ, with V and the places of S from a file if it gives them.

        Upstream solves for U with the V that it computes itself, although another machine's is in the file.
        """
        W, old = self.base_weight(), self.frod_V[self.role]
        if W.is_meta:
            return
        if V is not None and V.shape == old.shape and V.isfinite().all():
            self.frod_V[self.role] = V.to(W.device, old.dtype)
        elif old.is_meta:
            weights = [layer.base_weight().float().cpu() for layer in self.frod_layers[self.role]]
            self.frod_V[self.role] = basis(weights, c.regularization_alpha).to(W.device, old.dtype)
        if indices is not None and indices.shape == self.frod_s_indices[self.role].shape:
            if indices.is_floating_point() or ((indices < 0) | (indices >= len(old))).any():
                raise CheckpointError(f"frod_s_indices.{self.role} names places outside of S, {tuple(old.shape)}.")
            self.frod_s_indices[self.role] = indices.to(W.device)
        V = self.frod_V[self.role]
        for other in self.layer.adapters.values():  # the same V gives the same U
            if other is not self and other.frod_U is not None and torch.equal(other.frod_V[self.role], V):
                self.frod_U, self.frod_start = other.frod_U, other.frod_start
                return
        W, wide = W.double(), V.double()
        try:
            U = torch.linalg.solve(wide, W.T).T
        except torch.linalg.LinAlgError:  # V is singular where all weights of the role are
            U = W @ torch.linalg.pinv(wide, rtol=1e-6).T
        start = torch.linalg.vector_norm(U, dim=0)
        U = torch.where(start > 1e-12, U / start, 0.0)
        self.frod_U, self.frod_start = U.to(V.dtype).contiguous(), start.to(self.frod_lambda_l.dtype)

    def entries(self):
        """Where S has entries."""
        indices = self.frod_s_indices[self.role]
        known = self.frod_places.get(self.role)
        if known is None or not (torch.compiler.is_compiling() or known.made_of(indices)):
            known = self.frod_places[self.role] = Places(indices, self.layer.shape[1])
        return known

    def rebuilds_base(self):
        """Whether U diag(first ℓ) Vᵀ still is the base weight; asked anew where one of them has changed."""
        made_of = (self.layer.backend.get(self.base, self.kind.param), self.frod_V[self.role], self.frod_U)
        now = tuple(map(stamp, made_of))
        if self.sound[0] != now:
            with torch.no_grad():
                W = self.base_weight()
                off = (self.frod_U * self.frod_start.to(W)) @ self.frod_V[self.role].T - W
                self.sound = now, bool(off.abs().max() <= EXACT * W.abs().max())
        return self.sound[1]

    def instead(self, x):
        """In half precision the base and an update are nearer to the truth than U and V, rounded."""
        if x.numel() >= self.remakes_from * x.shape[-1] or x.dtype.itemsize < 4:
            return None
        if self.remakes() or not self.rebuilds_base():
            return None
        return self._times(x, self.frod_lambda_l, self.base.bias)

    @property
    def remakes_from(self):
        """Tokens from which to make the whole weight, in * in * out, costs less than to pass them through V."""
        out, inp = self.layer.shape
        if not torch.is_grad_enabled():
            return out
        return 3 * out * inp / (2 * inp - out) if 2 * inp > out else math.inf

    def remakes(self):
        return dropout_rate(self.frod_dropout)

    def _times(self, x, diagonal, bias=None):
        """U (S + diag) Vᵀ x + bias."""
        V = self.frod_V[self.role]
        return product(x, V, self.frod_U, diagonal, self.frod_lambda_s_values, bias, self.entries())

    def output(self, x, y):
        update = self._times(through(self.frod_dropout, x), self.frod_lambda_l - self.frod_start)
        return y + update.to(y.dtype)

    def delta_weight(self):
        like = self.frod_lambda_l
        V, U = self.frod_V[self.role].to(like), self.frod_U.to(like)
        return Weight.apply(V, U, like - self.frod_start, self.frod_lambda_s_values, self.entries())


FrodLayer = layer_class("FrodLayer", Frod)


class FrodModel(Tuner):
    """A model with FRoD adapters."""

    layer_cls = FrodLayer
    target_module_mapping = FROD_TARGETS

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        for name in ("projection_prng_key", "save_projection", "runtime_offload_base_weight"):
            if len(values := {getattr(c, name) for c in self.configs_like(config)}) > 1:
                raise ConfigError(f"All FRoD adapters of a model need the same {name}, got {sorted(values)}.")


register("FROD", FrodConfig, tuner=FrodModel, prefix="frod_")
