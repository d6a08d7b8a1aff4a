"""The part of X-LoRA that is trained: a small network that weighs the experts for each token."""

import itertools

import torch
from torch import nn


class XLoraClassifier(nn.Module):
    """Hidden states (batch, tokens, hidden_size) -> scalings (batch, tokens, layers, experts)."""

    def __init__(self, config, layers, experts, **where):
        super().__init__()
        self.config, self.shape = config, (layers, experts)
        widths = [config.hidden_size] + [config.xlora_size] * (config.xlora_depth - 1)
        parts = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after, **where), nn.ReLU()]
            parts += [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p > 0 else []
        parts.append(nn.Linear(widths[-1], experts * (layers if config.layerwise_scalings else 1), **where))
        self.layers = nn.Sequential(*parts)

    def forward(self, hidden):
        layers, experts = self.shape
        scalings = self.layers(hidden.to(self.layers[0].weight.dtype)).unflatten(-1, (-1, experts))
        if self.config.enable_softmax:
            scalings = (scalings / self.config.softmax_temperature).softmax(-1)
        return scalings.expand(-1, -1, layers, -1)


def gates(config, scalings):
    """What the experts' updates are multiplied with: the scalings, or only the largest of each token and layer."""
    if config.top_k_lora is not None:
        best, index = scalings.topk(config.top_k_lora, dim=-1)
        # Over the experts of a token; upstream's goes over all tokens, layers and samples at once.
        best = best.softmax(-1) if config.enable_softmax_topk else best
        scalings = torch.zeros_like(scalings).scatter(-1, index, best)
    return scalings * config.global_scaling_weight


class ScalingsLog:
    """The scalings of recent calls: the latest, and all those since logging was turned on."""

    def __init__(self):
        self.latest, self.all, self.on = None, [], False

    def add(self, scalings):
        self.latest = scalings
        if self.on:
            self.all.append(scalings.detach())

    def by_length(self):
        """{number of tokens: ([positions in the log], [scalings])}."""
        buckets = {}
        for i, scalings in enumerate(self.all):
            positions, found = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(i)
            found.append(scalings)
        return buckets

    def __getstate__(self):
        """Copies and pickles cannot take the graph that the latest scalings hang on."""
        return {**self.__dict__, "latest": None}
