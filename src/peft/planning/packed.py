"""Linear layers whose weight a quantization library would store in few bits, by arithmetic: no library is needed."""

import math

import torch
from torch import nn

from peft import quant
from peft.errors import ConfigError, nearest
from peft.ops import product
from peft.quant.backend import Plain

BLOCK, OUTER_BLOCK = 64, 256  # numbers that share a scale, and scales that share one of the second level


def four_bit(out, inp):
    return math.ceil(out * inp / 2) + 4 * math.ceil(out * inp / BLOCK)


def four_bit_double(out, inp):
    blocks = math.ceil(out * inp / BLOCK)
    return math.ceil(out * inp / 2) + blocks + 4 * math.ceil(blocks / OUTER_BLOCK)


def eight_bit(out, inp):
    return out * inp + 4 * out


SIZES = {  # name -> bytes of a weight (out, in)
    "nf4": four_bit,
    "fp4": four_bit,
    "nf4_double": four_bit_double,
    "fp4_double": four_bit_double,
    "int8": eight_bit,
}


class Packed(nn.Module):
    """Takes the place of a linear layer; its weight is `size` bytes, and is made anew in `dtype` for each product."""

    def __init__(self, out_features, in_features, bias, size, dtype, by_way_of=None):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.by_way_of = by_way_of or dtype  # int8 is multiplied by its scales in float32
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = bias

    def make(self):
        W = torch.empty(self.out_features, self.in_features, dtype=self.by_way_of, device="meta")
        return W.to(self.dtype)

    def forward(self, x):
        return product.linear(x, self.make, self.bias)


class Backend(Plain):
    """What the library's own backend would be."""

    name = "planned"

    @staticmethod
    def owns(base):
        return isinstance(base, Packed)

    def unpack(self, base, packed):
        return base.make()

    def placement(self, base, param):
        return base.weight.device, base.dtype

    def maker(self, base, x):
        return base.make


def known():
    """Let peft find the storage of Packed layers."""
    if Backend not in quant.BACKENDS:
        quant.BACKENDS.append(Backend)


def check(name):
    """Raises ConfigError for a storage that is not in SIZES."""
    if name is not None and name not in SIZES:
        raise ConfigError(f"quantization={name!r} is not known; nearest: {nearest(name, SIZES)}.")


def pack(model, name, dtype):
    """Replace the linear layers of a model's blocks, as transformers does with bitsandbytes: not its output layer."""
    known()
    last = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)][-1:]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is head or (head is None and path in last):
            continue
        size = SIZES[name](layer.out_features, layer.in_features)
        way = torch.float32 if name == "int8" else None
        packed = Packed(layer.out_features, layer.in_features, layer.bias, size, dtype, way)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, packed)
    return model


def stand_in(layer):
    """A Packed layer in place of one that a library has quantized already."""
    known()
    backend = quant.find(layer)
    tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t is not layer.bias]
    name = {"bnb 4bit": "nf4", "bnb 8bit": "int8"}.get(backend.name)
    size = SIZES[name](layer.out_features, layer.in_features) if name else sum(t.nbytes for t in tensors)
    bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias, device="meta"), False)
    dtype = backend.placement(layer, "weight")[1]
    return Packed(layer.out_features, layer.in_features, bias, size, dtype, torch.float32 if name == "int8" else None)


def numbers_in(model):
    """How many numbers a model's parameters stand for."""
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, Packed)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())
