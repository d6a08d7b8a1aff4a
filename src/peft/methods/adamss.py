"""AdaMSS, W + P·blockdiag(Bᵢ)·[Aᵢ]·V: W's rows in clusters, for each an update of small rank (paper on OpenReview).

V holds W's first right singular vectors, frozen; P puts the clusters' rows back in order.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Buf, Derived, Mod
from peft.core.checkpoint import PREFIX
from peft.core.declare import layer_class
from peft.core.defaults import ADAMSS_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import AdapterMismatchError, ConfigError
from peft.methods.adamss_asa import SubspaceAllocator
from peft.methods.factored import Factored
from peft.ops import kmeans
from peft.ops.lowrank import LowRank
from peft.registry import register

ROUNDS, SEED = 10, 123456789  # of the clustering; files depend on both


@dataclass
class AdamssConfig(LayersConfig):
    """AdaMSS on linear layers. Wrong values raise ConfigError, naming the field.

    use_asa: train ever fewer subspaces, chosen by importance; see `AdamssModel.update_and_allocate`.
    """

    METHOD: ClassVar = PeftType.ADAMSS

    r: int = field(default=100, metadata={"help": "singular vectors of W that updates are made on"})
    num_subspaces: int = field(default=5, metadata={"help": "clusters of W's rows"})
    subspace_rank: int = field(default=1, metadata={"help": "rank of a cluster's update"})
    init_weights: Literal["orthogonal"] | bool | None = field(
        default="orthogonal", metadata={"help": "'orthogonal': start as the base model (B = 0); None: small random B"}
    )
    use_asa: bool = field(default=False, metadata={"help": "freeze unimportant subspaces while training"})
    asa_target_subspaces: int = field(default=50, metadata={"help": "subspaces of the model that are trained at last"})
    init_warmup: int = field(default=50, metadata={"help": "step at which importance is first measured"})
    final_warmup: int = field(default=1000, metadata={"help": "step at which the last subspaces are frozen"})
    mask_interval: int = field(default=100, metadata={"help": "steps from one choice of subspaces to the next"})
    asa_importance_beta: float = field(default=0.85, metadata={"help": "how slowly importance forgets"})
    asa_uncertainty_beta: float = field(default=0.85, metadata={"help": "how slowly importance's uncertainty forgets"})
    asa_schedule_exponent: float = field(default=3.0, metadata={"help": "the larger, the sooner subspaces are frozen"})
    use_dynamic_rank: bool = field(
        default=False, metadata={"help": "smaller ranks for clusters with few large singular values"}
    )
    svd_threshold: float = field(
        default=0.1,
        metadata={"help": "with use_dynamic_rank: squares of singular values this far below the first are small"},
    )
    random_seed: int = field(default=0, metadata={"help": "seed of the randomised SVD of W"})

    def __post_init__(self):
        super().__post_init__()
        if self.init_weights is True:
            raise ConfigError("AdamssConfig.init_weights must be 'orthogonal' or None, got True.")
        self.init_weights = self.init_weights or None
        for name in ("r", "num_subspaces", "subspace_rank"):
            check_range(self, name, 1)
        check_range(self, "svd_threshold", 0)
        if self.use_asa:
            check_range(self, "mask_interval", 1)
            check_range(self, "asa_target_subspaces", 1)
            check_range(self, "asa_schedule_exponent", above=0)
            if self.init_warmup >= self.final_warmup:
                raise ConfigError(
                    f"AdamssConfig.final_warmup must be after init_warmup={self.init_warmup}, got {self.final_warmup}."
                )


class Adamss(Factored):
    """y + P·blockdiag(Bᵢ)·[Aᵢ]·V·(x, 1); the 1 only where the base has a bias, which then changes too."""

    prefix = "adamss_"

    adamss_A, adamss_B = Mod(), Mod()  # of each cluster: (rank, r), (rows, rank)
    adamss_newB = Buf()  # V (r, in), or (r, in + 1)
    adamss_rows = Derived()  # (out,): where each output's row is among the clusters' rows

    start = None  # (V, [U's rows of a cluster]) between building and initialising

    def build(self, c, where):
        W = self.base_weight()
        if W.is_meta:
            raise ConfigError(f"AdaMSS needs the weight of {self.key}, which is on the meta device: load it first.")
        U, V = self._decompose(c)
        clusters = min(c.num_subspaces, len(U))
        found = torch.from_numpy(kmeans.labels(U.cpu().numpy(), clusters, ROUNDS, SEED))
        rows = [r for r in map(torch.nonzero, (found == i for i in range(clusters))) if len(r)]
        order = torch.cat(rows).flatten()
        parts = [U[r.flatten().to(U.device)] for r in rows]
        ranks = [self._rank(c, part) for part in parts]
        r = len(V)
        self.adamss_A = nn.ParameterList([torch.empty(k, r, **where) for k in ranks])
        self.adamss_B = nn.ParameterList([torch.empty(len(p), k, **where) for p, k in zip(parts, ranks)])
        self.adamss_newB = torch.empty(V.shape, **where)
        self.adamss_rows = order.argsort().to(W.device)
        self.start = None if self.adamss_newB.is_meta else (V, parts)

    def _decompose(self, c):
        """U (out, r) and V (r, in), the first singular vectors of W with its bias as one more column."""
        W, bias = self.base_weight().float(), self.layer.base_bias()
        W = W if bias is None else torch.cat([W, bias.detach().float()[:, None]], dim=1)
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(c.random_seed)
            U, _, V = torch.svd_lowrank(W, q=min(c.r, *W.shape), niter=2)
        return U.contiguous(), V.t().contiguous()

    @staticmethod
    def _rank(c, part):
        """The rank of the update of a cluster with these rows of U."""
        rank = min(c.subspace_rank, *part.shape)
        if c.use_dynamic_rank:
            strength = torch.linalg.svdvals(part).square()
            rank = max(1, min(rank, int((strength > c.svd_threshold * strength[0]).sum())))
        return rank

    def reset(self, c):
        if self.start is None:  # a file left some of it out
            U, V = self._decompose(c)
            parts = U[self.adamss_rows.argsort()].split([len(B) for B in self.adamss_B])
        else:
            V, parts = self.start
        self.adamss_newB.copy_(V)
        for A, B, part in zip(self.adamss_A, self.adamss_B, parts):
            A.copy_(torch.linalg.svd(part, full_matrices=False)[2][: len(A)])
            B.zero_() if c.init_weights else B.normal_(std=0.01)
        self.start = None

    @classmethod
    def from_file(cls, c, tensors, adapters):
        """No file says which rows a cluster has, but the sizes tell whether this base gives the file's clusters."""
        rows = {k.removeprefix(PREFIX): t.shape[0] for k, t in tensors.items() if ".adamss_B." in k}
        for a in adapters:
            here = [len(B) for B in a.adamss_B]
            held = [rows.get(f"{a.key}.adamss_B.{i}", n) for i, n in enumerate(here)]
            if held != here or f"{a.key}.adamss_B.{len(here)}" in rows:
                raise AdapterMismatchError(
                    f"The rows of {a.key} are clustered in parts of {here} here, but the file was made with {held}, so "
                    "it is not known which rows its numbers belong to. The base model's weights, r, num_subspaces or "
                    "random_seed are not those of the training, or it was done on another kind of machine."
                )
        return tensors

    def factors(self):
        """[Aᵢ] (R, r), P·blockdiag(Bᵢ) (out, R) and V."""
        A = torch.cat([*self.adamss_A._parameters.values()])
        B = torch.block_diag(*self.adamss_B._parameters.values()).index_select(0, self.adamss_rows)
        return A, B, self.adamss_newB.to(A.dtype)

    def low_rank(self):
        """Two factors of three: the middle one goes to the side that leaves the smaller rank."""
        A, B, V = self.factors()
        inp = self.layer.shape[1]
        V, ones = V[:, :inp], V[:, inp] if V.shape[1] > inp else None  # apart at once: V needs no gradient
        if len(A) > len(V):
            B = B @ A
            return LowRank(V, B, 1.0, bias=None if ones is None else B @ ones)
        return LowRank(A @ V, B, 1.0, bias=None if ones is None else B @ (A @ ones))

    def merged_bias(self, b, W):
        extra = self.low_rank().bias
        return b if extra is None else b + extra.to(b.dtype)


AdamssLayer = layer_class("AdamssLayer", Adamss)


class AdamssModel(Tuner):
    """A model with AdaMSS adapters. With use_asa, each training step must call `update_and_allocate(step)`."""

    layer_cls = AdamssLayer
    target_module_mapping = ADAMSS_TARGETS

    def update_and_allocate(self, global_step):
        """Measure how much each subspace of the active adapters matters; freeze some when it is time to.

        Call it in every training step after backward and before zero_grad, or let `AdamssAsaCallback` do so.
        """
        for name in self.state.active:
            if self.peft_config[name].use_asa:
                self._allocator(name).step(self._adapters(name), global_step)

    def _allocator(self, name):
        config, allocators = self.peft_config[name], self.__dict__.setdefault("allocators", {})
        if name not in allocators or allocators[name].config is not config:
            allocators[name] = SubspaceAllocator(config)
        return allocators[name]

    def _adapters(self, name):
        """The adapter's parts on all layers, in the model's order."""
        return [layer.adapters[name] for layer in self.layers.values() if name in layer.adapters]

    def schedule_state(self):
        """Which subspaces are still trained, and what was measured of them, {name: tensor}, for checkpoints."""
        return {
            f"{name}/{key}": tensor
            for name, allocator in self.__dict__.get("allocators", {}).items()
            for key, tensor in allocator.state(self._adapters(name)).items()
        }

    def load_schedule_state(self, state):
        """Go on from what `schedule_state` gave."""
        for name in dict.fromkeys(key.rpartition("/")[0] for key in state):
            own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(f"{name}/")}
            self._allocator(name).load_state(own, self._adapters(name))


register("ADAMSS", AdamssConfig, tuner=AdamssModel, prefix="adamss_")
