"""Principal components of data that arrives in batches (Ross et al. 2008, as in scikit-learn's IncrementalPCA)."""

import torch


class IncrementalPCA:
    """Holds, after each `partial_fit`, components_ (n, features), singular_values_ (n,), mean_, var_ (features,),
    explained_variance_ and explained_variance_ratio_ (n,), and n_samples_seen_.

    n_components: None keeps as many as the first batch allows. batch_size: of `fit`, default 5 * features.
    lowrank: a randomised SVD with lowrank_q columns (default 2 * n_components), lowrank_niter iterations and
    lowrank_seed.
    """

    def __init__(
        self,
        n_components=None,
        copy=True,
        batch_size=None,
        svd_driver=None,
        lowrank=False,
        lowrank_q=None,
        lowrank_niter=4,
        lowrank_seed=None,
    ):
        if lowrank and n_components is None and lowrank_q is None:
            raise ValueError("n_components, or lowrank_q, must be given with lowrank=True.")
        self.n_components, self.copy, self.batch_size = n_components, copy, batch_size
        self.svd_driver, self.lowrank, self.lowrank_niter, self.lowrank_seed = (
            svd_driver,
            lowrank,
            lowrank_niter,
            lowrank_seed,
        )
        self.lowrank_q = lowrank_q or (2 * n_components if lowrank else None)
        if lowrank and n_components is not None and self.lowrank_q < n_components:
            raise ValueError(f"lowrank_q={self.lowrank_q} must be at least n_components={n_components}.")
        self.n_features_, self.n_samples_seen_ = None, 0

    def fit(self, X, check_input=True):
        """Forget everything, and fit (samples, features) in batches."""
        self.n_samples_seen_ = 0
        size = self.batch_size or 5 * X.shape[1]
        for rows in self.gen_batches(len(X), size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[rows], check_input)
        return self

    def partial_fit(self, X, check_input=True):
        """Take in further samples (samples, features)."""
        X = X if X.dtype in (torch.float32, torch.float64) else X.float()
        n, features = X.shape
        first = self.n_samples_seen_ == 0
        if first:
            self.n_features_ = features
            self.n_components_ = min(n, features) if self.n_components is None else self.n_components
        if not first and features != self.n_features_:
            raise ValueError(f"The batch has {features} features, earlier ones had {self.n_features_}.")
        if self.n_components_ > min(n, features):
            raise ValueError(
                f"n_components={self.n_components_} needs as many samples and features, got {(n, features)}."
            )
        if first:
            self.mean_ = self.var_ = X.new_zeros(features, dtype=torch.float64)
        seen, total = self.n_samples_seen_, self.n_samples_seen_ + n
        mean, var = X.double().mean(0), X.double().var(0, correction=0)
        shift = mean - self.mean_
        centred = X - mean.to(X.dtype)
        if not first:  # what is known so far counts as `seen` samples with these components
            correction = (seen * n / total) ** 0.5 * -shift
            known = self.singular_values_[:, None] * self.components_
            centred = torch.vstack([known, centred, correction.to(X.dtype)])
        S, Vt = self._svd(centred)
        Vt = Vt * _signs(Vt)
        self.var_ = (seen * self.var_ + n * var + seen * n / total * shift.square()) / total
        self.mean_ = self.mean_ + shift * n / total
        variance = S.square()
        k = self.n_components_
        self.n_samples_seen_ = total
        self.components_, self.singular_values_ = Vt[:k], S[:k]
        self.explained_variance_ = variance[:k] / (total - 1)
        self.explained_variance_ratio_ = variance[:k] / (self.var_ * total).sum().to(variance.dtype)
        rest = variance[k:]
        self.noise_variance_ = rest.mean() / (total - 1) if len(rest) else X.new_zeros(())
        return self

    def _svd(self, X):
        if not self.lowrank:
            return torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)[1:]
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            _, S, V = torch.svd_lowrank(X, q=min(self.lowrank_q, *X.shape), niter=self.lowrank_niter)
        return S, V.mT

    def transform(self, X):
        """Coordinates (samples, n) of samples along the components."""
        return (X - self.mean_.to(X.dtype)) @ self.components_.mT.to(X.dtype)

    @staticmethod
    def gen_batches(n, batch_size, min_batch_size=0):
        """Slices over n samples; a last one below min_batch_size is joined to the one before."""
        start = 0
        while start < n:
            end = start + batch_size
            end = n if n - end < min_batch_size else min(end, n)
            yield slice(start, end)
            start = end


def _signs(Vt):
    """±1 for each row: its largest entry becomes positive, so that components are comparable between batches."""
    largest = Vt.abs().argmax(dim=1, keepdim=True)
    return torch.gather(Vt, 1, largest).sign()
