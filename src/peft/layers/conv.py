"""nn.Conv1d, Conv2d and Conv3d, groups included."""

import torch
import torch.nn.functional as F
from torch import nn

from peft.layers.kind import Kind

OPS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Conv(Kind):
    """A convolution; its canonical weight (out, in / groups, *kernel) is how torch stores it."""

    name = "conv"

    @staticmethod
    def owns(base):
        return isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def shape(self, base):
        return tuple(base.weight.shape)

    def op(self, base, x, W):
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            return OPS[W.ndim](x, W, None, base.stride, 0, base.dilation, base.groups)
        return OPS[W.ndim](x, W, None, base.stride, base.padding, base.dilation, base.groups)

    def attach(self, layer):
        self.spatial = layer.get_base_layer().weight.ndim - 2

    def per_out(self, v):
        return v.reshape(1, -1, *[1] * self.spatial)

    per_in = per_out

    def factors(self, base, r, bias, **where):
        """A is a convolution like the base's, to r channels; B is pointwise, and carries the groups."""
        conv = getattr(nn, f"Conv{self.spatial}d")
        settings = {"dilation": base.dilation, "padding_mode": base.padding_mode}
        A = torch.nn.utils.skip_init(
            conv, base.in_channels, r, base.kernel_size, base.stride, base.padding, bias=False, **settings, **where
        )
        B = torch.nn.utils.skip_init(conv, r, base.out_channels, 1, groups=base.groups, bias=bias, **where)
        return A, B

    def factor_delta(self, A, B):
        if B.shape[1] != A.shape[0]:
            raise NotImplementedError(
                "This adapter cannot be merged: its A reads all input channels, but the base convolution has groups, "
                "so no weight of the base's shape does the same. Keep it unmerged."
            )
        return (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])
