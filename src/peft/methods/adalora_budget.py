"""AdaLoRA's budget: how many triplets a step may keep, and which ones matter most (arXiv 2303.10512, section 3)."""

import torch

from peft.errors import AdapterError


class RankAllocator:
    """Chooses the triplets of one adapter in training.

    sensitivity  running mean of |p · ∂loss/∂p| of every trained number
    uncertainty  running mean of how far single steps were from it; a triplet's score is made of their products
    """

    def __init__(self, config):
        self.config = config
        self.sensitivity, self.uncertainty = [], []
        self.masks = (None, [])  # (the rank_pattern they were made of, [(E, True where it is left out)])

    def state(self):
        """All that changes from step to step, {name: tensor}, for checkpoints."""
        found = {f"kept.{key}": torch.tensor(flags) for key, flags in (self.config.rank_pattern or {}).items()}
        for name in ("sensitivity", "uncertainty"):
            found |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(self, name))}
        return found

    def load_state(self, state):
        """Go on from what `state` gave."""
        kept = {name[len("kept.") :]: flags.tolist() for name, flags in state.items() if name.startswith("kept.")}
        self.config.rank_pattern = kept or self.config.rank_pattern
        count = sum(name.startswith("sensitivity.") for name in state)
        self.sensitivity = [state[f"sensitivity.{i}"] for i in range(count)]
        self.uncertainty = [state[f"uncertainty.{i}"] for i in range(count)]

    @torch.no_grad()
    def step(self, adapters, step):
        """One training step: see AdaLoraModel.update_and_allocate."""
        c, last = self.config, self.config.total_step - self.config.tfinal
        if step < last:
            self.observe(adapters)
        if step > last:
            self._mask(adapters)
        elif step == last or (step > c.tinit and step % c.deltaT == 0):
            self._choose(adapters, self.budget(adapters, step))
        if step == last:
            self.sensitivity, self.uncertainty = [], []

    def budget(self, adapters, step):
        """How many triplets step `step` keeps: all until tinit, then fewer along a cubic curve down to target_r."""
        c = self.config
        first, last = sum(len(a.lora_E) for a in adapters), c.target_r * len(adapters)
        left = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        return first if step <= c.tinit else int((first - last) * max(left, 0.0) ** 3 + last)

    def observe(self, adapters):
        """Take the gradients of a step into the running means; all tensors at once."""
        params = [p for a in adapters for p in a.triplet_parameters()]
        if all(p.grad is None for p in params):
            raise AdapterError("update_and_allocate found no gradients: call it after backward and before zero_grad.")
        if [p.shape for p in params] != [s.shape for s in self.sensitivity]:  # the first step, or ranks were cut
            self.sensitivity = [torch.zeros_like(p) for p in params]
            self.uncertainty = [torch.zeros_like(p) for p in params]
        now = torch._foreach_mul(params, [torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        torch._foreach_abs_(now)
        for means, beta in ((self.sensitivity, self.config.beta1), (self.uncertainty, self.config.beta2)):
            torch._foreach_mul_(means, beta)
            torch._foreach_add_(means, now, alpha=1 - beta)
            if means is self.sensitivity:
                torch._foreach_sub_(now, means)
                torch._foreach_abs_(now)

    def scores(self):
        """How much each triplet of any layer matters: the score of its E plus the mean scores of its A and B."""
        products = torch._foreach_mul(self.sensitivity, self.uncertainty)
        parts = zip(products[0::3], products[1::3], products[2::3])
        return torch.cat([E.flatten() + A.mean(1) + B.mean(0) for A, E, B in parts])

    def _choose(self, adapters, budget):
        """Let the config's rank_pattern keep the triplets with the highest scores."""
        sizes = [len(a.lora_E) for a in adapters]
        scores = self.scores()
        out = len(scores) - budget
        keep = scores > scores.kthvalue(out).values if out > 0 else torch.ones_like(scores, dtype=torch.bool)
        kept = iter(keep.tolist())  # one wait for the device
        self.config.rank_pattern = {
            f"{a.key}.lora_E": [next(kept) for _ in range(size)] for a, size in zip(adapters, sizes)
        }
        for a, flags in zip(adapters, keep.split(sizes)):
            a.lora_E.masked_fill_(~flags[:, None], 0.0)

    def _mask(self, adapters):
        """Hold what was left out at zero: the optimizer still moves it."""
        pattern = self.config.rank_pattern or {}
        if self.masks[0] is not pattern:
            keep = [(a.lora_E, pattern.get(f"{a.key}.lora_E", ())) for a in adapters]
            keep = [(E, torch.tensor(k, device=E.device)) for E, k in keep if len(k) == len(E)]
            self.masks = pattern, [(E, ~k[:, None]) for E, k in keep]
        for E, left_out in self.masks[1]:
            E.masked_fill_(left_out, 0.0)
