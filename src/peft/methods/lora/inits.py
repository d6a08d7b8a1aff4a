"""Initial values of A and B: one function a mode, in the table INITS.

A mode whose BA is not zero at the start subtracts that part: pissa and olora return (A0, B0), and the adapter then
computes W + s·(BA − B0·A0). The base weight is never touched, so disabling such an adapter gives the base model bit for
bit, and several of them can share a model. The file holds A and B only; A0 and B0 follow from the base weight. The
exception is loftq, whose point is another base weight.
"""

import math
import re

import torch
from torch import nn

from peft.errors import ConfigError
from peft.layers.linear import Conv1D

SEED = 20405  # for the randomised SVD: loading must find the very factors that training started from
FROM_DATA = ("corda", "lora_ga")  # no base weight gives these starts back: files hold them, see `plain.plain_form`


def check_init(mode):
    """Raise ConfigError for a mode that is unknown or needs data that this version does not collect."""
    if isinstance(mode, bool):
        return
    if mode.lower() not in INITS and not re.fullmatch(r"pissa_niter_\d+", mode.lower()):
        raise ConfigError(
            f"Unknown initialization init_lora_weights={mode!r}: use True, False or one of "
            f"{', '.join(map(repr, INITS))} or 'pissa_niter_N'."
        )


def subtracted(mode, W, r, s):
    """(A0, B0) that `mode` starts from and subtracts, or None. W: canonical, 2-D. A0 (r, in), B0 (out, r)."""
    mode = mode.lower() if isinstance(mode, str) else ""
    if mode == "olora":
        return olora(W, r)
    if mode.startswith("pissa"):
        niter = mode.removeprefix("pissa").removeprefix("_niter_")
        return pissa(W, r, s, int(niter) if niter else None)
    return None


def from_data(mode, base, W, r, s, c):
    """(A0, B0) from what `preprocess_corda` or `preprocess_loraga` left at the base layer, or None without that."""
    if mode == "corda":
        from peft.methods.lora import corda

        return corda.start(base.eigens, r, s) if hasattr(base, corda.EIGENS) else None
    from peft.methods.lora import loraga

    gradient = getattr(base, loraga.GRADIENT, None)
    if gradient is None:
        return None
    gradient = gradient if gradient.shape == W.shape and not Conv1D.owns(base) else gradient.T
    return loraga.start(gradient.float(), W, r, s, c.lora_ga_config)


def olora(W, r):
    """The first r columns and rows of W = QR (arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(W.float())
    return R[:r].contiguous(), Q[:, :r].contiguous()


def pissa(W, r, s, niter=None):
    """The r principal components of W, shared out evenly between A and B (arXiv 2404.02948)."""
    W = W.float()
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.t()
    root = torch.sqrt(S[:r] / s)
    return (root[:, None] * Vh[:r]).contiguous(), (U[:, :r] * root).contiguous()


def kaiming(A, B, W, c):
    """A uniform as in a fresh nn.Linear, B zero."""
    bound = 1 / math.sqrt(A[0].numel())
    A.uniform_(-bound, bound)
    B.zero_()


def random_both(A, B, W, c):
    """Both as in a fresh nn.Linear: the adapter is not the identity at the start."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def gaussian(A, B, W, c):
    """A normal with standard deviation 1 / r, B zero."""
    nn.init.normal_(A, std=1 / A.shape[0])
    B.zero_()


def orthogonal(A, B, W, c):
    """A and B span orthogonal halves of the rank space, so BA = 0 although neither is zero."""
    r = A.shape[0]
    if r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even r, got {r}.")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A.copy_((torch.randn(A.flatten(1).shape[1], r // 2) @ Q[0::2] / 10).t().reshape(A.shape))
    B.copy_((torch.randn(B.shape[0], r // 2) @ Q[1::2] / 10).reshape(B.shape))


def mica(A, B, W, c):
    """B is the r minor left singular vectors of W and stays frozen, A starts at zero (arXiv 2604.01694)."""
    r = A.shape[0]
    if W.ndim != 2 or r > min(W.shape):
        raise ConfigError(f"init_lora_weights='mica' needs a matrix with at least r={r} singular values.")
    U, _, _ = torch.linalg.svd(W.float(), full_matrices=False)
    B.copy_(U[:, -r:])
    A.zero_()


INITS = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "mica": mica,
    "pissa": None,  # A and B start as (A0, B0), see `subtracted`
    "olora": None,
    "corda": None,
    "lora_ga": None,
    "eva": kaiming,  # until `initialize_lora_eva_weights`
    "loftq": None,
}


def initialise(mode, A, B, W, c):
    """Fill the factors' weights. W: a function that gives the canonical base weight."""
    if mode is True:
        return kaiming(A, B, W, c)
    if mode is False:
        return random_both(A, B, W, c)
    init = INITS[mode.lower()]
    return init(A, B, W() if init is mica else None, c)
