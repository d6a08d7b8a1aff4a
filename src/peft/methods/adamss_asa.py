"""AdaMSS's adaptive subspace allocation: while training goes on, ever fewer of a model's subspaces are trained."""

import torch


class SubspaceAllocator:
    """Chooses the subspaces of one adapter that go on being trained, by the sensitivity of the loss to their numbers.

    A subspace that was frozen stays so: without gradients nothing says that it matters.
    """

    def __init__(self, config):
        self.config = config
        self.params, self.importance, self.uncertainty = [], [], []

    def state(self, adapters):
        """All that changes from step to step, {name: tensor}, for checkpoints."""
        found = {"trained": torch.tensor([p.requires_grad for p in self.of(adapters)])}
        for name in ("importance", "uncertainty") if self.params else ():
            found |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(self, name))}
        return found

    def load_state(self, state, adapters):
        """Go on from what `state` gave."""
        params = self.of(adapters)
        for p, trained in zip(params, state["trained"].tolist()):
            p.requires_grad = trained
        if "importance.0" in state:
            self.params = [p for p in params if p.requires_grad]
            self.importance = [state[f"importance.{i}"] for i in range(len(self.params))]
            self.uncertainty = [state[f"uncertainty.{i}"] for i in range(len(self.params))]

    @staticmethod
    def of(adapters):
        """The factors of all subspaces: A, B, A, B, ..."""
        return [p for a in adapters for pair in zip(a.adamss_A, a.adamss_B) for p in pair]

    @torch.no_grad()
    def step(self, adapters, step):
        """One training step: see AdamssModel.update_and_allocate."""
        c = self.config
        if not c.init_warmup <= step <= c.final_warmup:
            return
        pairs = [pair for a in adapters for pair in zip(a.adamss_A, a.adamss_B)]
        self.observe([p for pair in pairs if None not in (pair[0].grad, pair[1].grad) for p in pair])
        if step % c.mask_interval == 0:
            self.choose(self.target(len(pairs), step))
            self.params = []

    def target(self, total, step):
        """How many of the model's `total` subspaces step `step` lets train."""
        c = self.config
        left = 1 - (step - c.init_warmup) / (c.final_warmup - c.init_warmup)
        return int(c.asa_target_subspaces + (total - c.asa_target_subspaces) * left**c.asa_schedule_exponent)

    def observe(self, params):
        """Take a step's gradients into the running means of |p · ∂loss/∂p| and of how far steps are from it."""
        if [*map(id, params)] != [*map(id, self.params)]:
            self.params = params
            self.importance = [torch.zeros_like(p) for p in params]
            self.uncertainty = [torch.zeros_like(p) for p in params]
        if not params:
            return
        c = self.config
        now = torch._foreach_mul(params, [p.grad for p in params])
        torch._foreach_abs_(now)
        off = torch._foreach_sub(now, self.importance)  # from the mean before this step
        torch._foreach_abs_(off)
        for means, new, beta in (
            (self.uncertainty, off, c.asa_uncertainty_beta),
            (self.importance, now, c.asa_importance_beta),
        ):
            torch._foreach_mul_(means, beta)
            torch._foreach_add_(means, new, alpha=1 - beta)

    def choose(self, target):
        """Freeze all that are trained but the `target` most important subspaces. (Upstream keeps one fewer.)"""
        if 2 * target >= len(self.params):
            return
        products = torch._foreach_mul(self.importance, self.uncertainty)
        scores = torch.stack([p.mean() for p in products]).view(-1, 2).sum(1)
        kept = set(scores.topk(max(target, 0)).indices.tolist())
        for i, p in enumerate(self.params):
            if i // 2 not in kept:
                p.requires_grad, p.grad = False, None
