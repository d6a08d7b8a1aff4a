"""Layers that are whole parts of a transformer."""

from peft.core.layer import AdapterLayer


class HiddenStatesLayer(AdapterLayer):
    """A wrapper around a part of a transformer, which gets its hidden states by position or by name."""

    def forward(self, *args, **kwargs):
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        return super().forward(*args, **kwargs)
