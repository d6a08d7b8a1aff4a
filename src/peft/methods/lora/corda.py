"""CorDA: A and B start as the part of W that matters most, or least, for given inputs (arXiv 2406.05223)."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from peft.core import match
from peft.errors import ConfigError
from peft.layers.linear import Conv1D
from peft.methods.lora.inputs import mean_of_inputs
from peft.methods.lora.loraga import linear_targets, read_cache, write_cache

EIGENS = "eigens"  # the attribute of a base layer that holds its decomposition until the adapter is made
INVERSE_ERROR = 0.05  # how far C·C⁻¹ may be from the identity before more damping is added


@dataclass
class CordaConfig:
    """Where results are kept, and which part of W is trained: ipm the most important one, kpm the least."""

    cache_file: str | None = field(default=None, metadata={"help": "file of the decompositions, read if it exists"})
    covariance_file: str | None = field(default=None, metadata={"help": "file of the covariances, read if it exists"})
    corda_method: Literal["ipm", "kpm"] = field(
        default="ipm", metadata={"help": "ipm: learn the task better; kpm: keep what the inputs need as it is"}
    )
    verbose: bool = field(default=False, metadata={"help": "show progress"})
    use_float16_for_covariance: bool = field(default=False, metadata={"help": "half the memory, less exact"})
    prune_temporary_fields: bool = field(default=True, metadata={"help": "drop the covariances afterwards"})

    def __post_init__(self):
        if self.corda_method not in ("ipm", "kpm"):
            raise ConfigError(f"CordaConfig.corda_method must be 'ipm' or 'kpm', got {self.corda_method!r}.")


class CordaEigens(NamedTuple):
    """U·diag(S)·Vᵀ ≈ W: S_WC (r,), U_WC (out, r), V_WC (in, r)."""

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


@torch.no_grad()
def preprocess_corda(model, lora_config, run_model=None, hooked_model=None):
    """Find the decompositions that adapters made with init_lora_weights="corda" start from.

    run_model(): forwards over sample inputs; may be None where a file of the config exists already. hooked_model: the
    model that it runs, if that is another one. Raises ValueError where inputs are needed and not given, or not finite.
    """
    corda = lora_config.corda_config
    if corda is None:
        raise ConfigError("CorDA needs LoraConfig(init_lora_weights='corda', corda_config=CordaConfig(...)).")
    layers = linear_targets(model, lora_config)
    device = next(model.parameters()).device
    if (cache := read_cache(corda.cache_file, device)) is not None:
        for name, layer in layers.items():
            layer.eigens = CordaEigens(*(cache[f"{name}.{EIGENS}.{part}"] for part in CordaEigens._fields))
        return
    covariances = read_cache(corda.covariance_file, device)
    if covariances is None:
        if run_model is None:
            raise ConfigError("preprocess_corda needs run_model, as neither the cache nor the covariance file exists.")
        covariances = covariance_of_inputs(hooked_model or model, lora_config, run_model)
        write_cache(corda.covariance_file, covariances)
    names = layers
    if corda.verbose:
        from tqdm import tqdm

        names = tqdm(layers, desc="CorDA: decompositions")
    for name in names:
        layer = layers[name]
        r = match.pattern_value(lora_config.rank_pattern, name, lora_config.r)
        W = layer.weight.float()
        layer.eigens = decompose(W.T if Conv1D.owns(layer) else W, covariances[name].float(), r, corda.corda_method)
        if not corda.prune_temporary_fields:
            layer.covariance_matrix = covariances[name]
    kept = {n: layer.eigens._asdict().items() for n, layer in layers.items()}
    write_cache(corda.cache_file, {f"{n}.{EIGENS}.{part}": t for n, parts in kept.items() for part, t in parts})


def covariance_of_inputs(model, config, run_model):
    """{layer name: XᵀX / batches} of each layer's inputs X (tokens, in), which are scaled to at most 1."""
    half = config.corda_config.use_float16_for_covariance

    def covariance(x):
        x = x if half else x.float()
        x = x / x.max().abs()
        return x.t() @ x

    return mean_of_inputs(model, linear_targets(model, config), run_model, covariance)


def decompose(W, C, r, method):
    """The r largest ("ipm") or smallest ("kpm") singular parts of W·C, taken back by C⁻¹. W (out, in), C (in, in)."""
    eye, damping = torch.eye(len(C), device=C.device), 0.01
    while True:
        damped = C + eye * C.diagonal().mean() * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < INVERSE_ERROR:
            break
        damping *= 2
    U, S, Vt = torch.linalg.svd(W @ damped, full_matrices=False)
    part = slice(r) if method == "ipm" else slice(len(S) - r, None)
    return CordaEigens(S[part].clone(), U[:, part].clone(), (Vt[part] @ inverse).t().contiguous())


def start(eigens, r, scaling):
    """(A, B) to start from: s·BA is the chosen part of W."""
    if len(eigens.S_WC) != r:
        raise ConfigError(
            f"CorDA's decomposition has rank {len(eigens.S_WC)}, the adapter {r}: preprocess with its config."
        )
    root = (eigens.S_WC / scaling).sqrt()
    return root[:, None] * eigens.V_WC.t(), eigens.U_WC * root
