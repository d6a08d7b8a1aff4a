"""Arithmetic on pairs of factors: A (r, in, *kernel) and B (out, r / groups, ...), whose product is one update.

In a grouped convolution each group of outputs reads its own r / groups rows of A, so ranks grow within the groups.
"""

import torch


def joined(pairs):
    """One pair whose product is the sum of the products of `pairs`; its rank is the sum of theirs."""
    groups = _groups(*pairs[0])
    A = torch.cat([A.reshape(groups, -1, *A.shape[1:]) for A, _ in pairs], dim=1).flatten(0, 1)
    return A, torch.cat([B for _, B in pairs], dim=1)


def widened(A, B, rank):
    """The pair at a larger rank, filled up with zeros."""
    missing, groups = rank - A.shape[0], _groups(A, B)
    if not missing:
        return A, B
    return joined([(A, B), (A.new_zeros(missing, *A.shape[1:]), B.new_zeros(len(B), missing // groups, *B.shape[2:]))])


def square_norm(A, B):
    """‖BA‖² without forming BA, in double precision."""
    groups = _groups(A, B)
    A = A.detach().cpu().double().reshape(groups, A.shape[0] // groups, -1)
    B = B.detach().cpu().double().reshape(groups, B.shape[0] // groups, -1)
    return float(((B.mT @ B) * (A @ A.mT)).sum())


def svd(A, B, rank):
    """The pair of that rank nearest to BA, by decomposing the factors alone; A (r, in), B (out, r)."""
    Qa, Ra = torch.linalg.qr(A.t())
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)
    return widened(Vh[:rank] @ Qa.t(), (Qb @ U[:, :rank]) * S[:rank], rank)


def svd_dense(W, rank, driver=None, clamp=None):
    """The pair of that rank nearest to the matrix W. clamp: cut both factors at this quantile of their values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False, driver=driver)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        limit = torch.cat([B.flatten(), A.flatten()]).quantile(clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return widened(A, B, rank)


def _groups(A, B):
    return A.shape[0] // B.shape[1]
