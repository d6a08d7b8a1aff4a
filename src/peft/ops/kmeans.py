"""K-means whose labels are those of scikit-learn's KMeans(init="random", n_init=1), without asking for that package.

Files tell nothing of the clusters that they were made with, so the same points must give the same labels bit for bit,
also where points are equally far from two centres: the order of float32 operations is scikit-learn's.
"""

import numpy as np

CHUNK = 256  # points whose distances are computed in one product


def labels(points, clusters, rounds, seed):
    """The cluster, 0 ... clusters - 1, of each row of `points` (n, dim); a numpy array (n,)."""
    X = np.ascontiguousarray(points, dtype=np.float32)
    enough = np.float32(1e-4) * X.var(axis=0).mean()  # centres that moved less than this have settled
    X = X - X.mean(axis=0)
    even = np.ones(len(X), dtype=np.float32)
    first = np.random.RandomState(seed).choice(len(X), size=clusters, replace=False, p=even / even.sum())
    centres, before = X[first], None
    for _ in range(rounds):
        found = _nearest(X, centres)
        moved = _means(X, found, centres)
        shift, centres = np.square(moved - centres).sum(), moved
        if before is not None and np.array_equal(found, before):
            return found
        if shift <= enough:
            break
        before = found
    return _nearest(X, centres)


def _nearest(X, centres):
    """The index of the centre next to each point."""
    squares = np.einsum("ij,ij->i", centres, centres)
    return np.concatenate([(squares - 2 * (X[i : i + CHUNK] @ centres.T)).argmin(1) for i in range(0, len(X), CHUNK)])


def _means(X, found, centres):
    """The mean of each cluster's points; clusters without any take the points farthest from their centres."""
    sums, count = np.zeros_like(centres), np.bincount(found, minlength=len(centres)).astype(np.float32)
    np.add.at(sums, found, X)
    empty = np.flatnonzero(count == 0)
    if len(empty):
        distance = np.square(X - centres[found]).sum(1)
        if distance.max() > 0:
            for cluster, point in zip(empty, np.argpartition(distance, -len(empty))[: -len(empty) - 1 : -1]):
                sums[found[point]] -= X[point]
                sums[cluster] = X[point]
                count[found[point]] -= 1
                count[cluster] = 1
    return sums * (1 / np.maximum(count, 1))[:, None]
