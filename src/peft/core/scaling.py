"""Scaling the updates of a layer's adapters, for methods that have a field `scaling`."""

import torch


class Scalable:
    """A layer whose adapters' updates are multiplied by `self.scaling[adapter]`; without that field, nothing is."""

    scaling: dict

    def set_scale(self, adapter, scale):
        """Scale an adapter's update by `scale` times what it was made with."""
        if adapter in self.adapters and "scaling" in self.__dict__:
            self._rescale(adapter, scale * self.adapters[adapter].native_scaling())

    def scale_layer(self, scale):
        """Multiply the scaling of the active adapters."""
        if scale != 1 and "scaling" in self.__dict__:
            for adapter in self.live():
                self.scaling[adapter.name] *= scale

    def unscale_layer(self, scale=None):
        """Undo `scale_layer(scale)`; None: back to the scaling that the adapters were made with."""
        for adapter in self.live() if "scaling" in self.__dict__ else ():
            name = adapter.name
            self._rescale(name, adapter.native_scaling() if scale is None else self.scaling[name] / scale)

    def _rescale(self, name, value):
        """A scaling made a tensor for hotswapping stays that tensor: a compiled model has it as an input."""
        if isinstance(self.scaling[name], torch.Tensor):
            self.scaling[name].fill_(value)
        else:
            self.scaling[name] = float(value)
