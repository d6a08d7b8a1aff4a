"""A block with Shadow adapters."""

import torch
from torch import nn

from peft.core.adapter import Adapter, Mod, Val, through
from peft.core.hidden_states import HiddenStatesLayer
from peft.errors import AdapterError


class Shadow(Adapter):
    """h' = h + α·up(down(h - s)), y = block(h'), s' = (1 - g)∘s + g∘T(y) with g = sigmoid(G(y)).

    h, y are the model's hidden states before and after the block, s the shadow state, (batch, tokens, width) each.
    """

    prefix = "shadow_"
    kinds = ("block",)
    by_row = False  # the states of its blocks belong to the whole batch

    shadow_down, shadow_up = Mod(), Mod()  # width -> r -> width
    shadow_dropout = Mod(trainable=False)
    shadow_update_transform, shadow_update_gate = Mod(), Mod()  # T and G, width -> hidden -> width
    alpha, index = Val(), Val()  # index: the block's number among those with the adapter
    width = Val(shared=True)  # of the model's hidden states

    def build(self, c, where):
        self.alpha, width, hidden = c.shadow_alpha, self.width, c.update_hidden_size or c.r
        self.shadow_down = nn.Linear(width, c.r, bias=False, **where)
        self.shadow_up = nn.Linear(c.r, width, bias=False, **where)
        if c.shadow_dropout:
            self.shadow_dropout = nn.Dropout(c.shadow_dropout)
        self.shadow_update_transform = _mlp(width, hidden, where)
        self.shadow_update_gate = _mlp(width, hidden, where)

    def reset(self, c):
        for part in (self.shadow_down, self.shadow_up, *self.shadow_update_transform, *self.shadow_update_gate):
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        if c.init_weights:
            self.shadow_up.weight.zero_()

    @classmethod
    def file_key(cls, key, name):
        """Files say "default" where the model has the adapter's name."""
        field, _, rest = key.partition(".")
        return f"{field}.default{rest.removeprefix(name)}"

    def input(self, x):
        s = self._states()[self.index]
        difference = through(self.shadow_dropout, x - s.to(x.dtype))
        correction = self.shadow_up(self.shadow_down(self.cast(difference, self.shadow_down.weight.dtype)))
        return x + self.alpha * correction.to(x.dtype)

    def output(self, x, y):
        states = self._states()
        if self.index + 1 < len(states):  # nothing reads what the last block would make of it
            h = self.cast(y, self.shadow_down.weight.dtype)
            candidate, gate = self.shadow_update_transform(h), self.shadow_update_gate(h).sigmoid()
            states[self.index + 1] = torch.lerp(states[self.index].to(candidate.dtype), candidate, gate)
        return y

    def _states(self):
        """[s before each block] of this call; each block fills in the next one's."""
        call = self.layer.state.call()
        if call is None or "shadow" not in call.arguments:
            raise AdapterError(
                f"{self.key} was not called through its PeftModel, so there is no shadow state. Call that, not the "
                "base model or a part of it."
            )
        if call.arguments["shadow_grad"] and not torch.is_grad_enabled():
            raise AdapterError(
                f"Checkpointing runs {self.key} without gradients first, so the shadow state would have none. "
                "Checkpoint with use_reentrant=False."
            )
        return call.arguments["shadow"]


def _mlp(width, hidden, where):
    return nn.Sequential(nn.Linear(width, hidden, **where), nn.GELU(), nn.Linear(hidden, width, **where))


class ShadowLayer(HiddenStatesLayer):
    """A block with Shadow adapters."""

    adapter_cls = Shadow

    def forward(self, *args, **kwargs):
        call = self.state.call()
        if call is not None and (reach := call.arguments.get("shadow_reach")) is not None:
            reach(self, args, kwargs)  # here, so that checkpointing which recomputes the block runs it again
        return super().forward(*args, **kwargs)
