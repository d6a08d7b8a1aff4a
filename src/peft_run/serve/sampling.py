"""One row's next token, from its own logits and its own generator: what the other rows do cannot change it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LARGEST_SEED = 2**63 - 1


@dataclass
class Sampling:
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator | None:
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed & LARGEST_SEED)
        return generator


@dataclass
class Chosen:
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)  # the likeliest tokens, best first


def choose(
    logits: torch.Tensor, likeliest: int, sampling: Sampling, generator: torch.Generator | None, logprobs: int | None
) -> Chosen:
    """logits (vocabulary); likeliest: where they are highest, which the whole batch is asked for at once.

    logprobs: how many likely tokens to tell, None: not even the chosen one's own figure.
    """
    if generator is None:
        token = likeliest
    else:
        token = draw(logits.double().cpu() / sampling.temperature, sampling.top_p, generator)
    if logprobs is None:
        return Chosen(token)
    figures = logits.float().log_softmax(-1)
    best = figures.topk(logprobs) if logprobs else None
    top = list(zip(best.indices.tolist(), best.values.tolist())) if best else []
    return Chosen(token, float(figures[token]), top)


def draw(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    """The token at a random place of the cumulated probabilities: a rounding error moves it only across a border."""
    probabilities = logits.softmax(-1)
    place = torch.rand((), generator=generator, dtype=torch.float64)
    if top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        sums = ordered.cumsum(0)
        kept = max(1, int((sums - ordered < top_p).sum()))  # the smallest set that reaches top_p
        at = int(torch.searchsorted(sums[:kept], place * sums[kept - 1], right=True))
        return int(tokens[min(at, kept - 1)])
    sums = probabilities.cumsum(0)
    at = int(torch.searchsorted(sums, place * sums[-1], right=True))
    return min(at, len(sums) - 1)
