"""Layer kinds: everything the house knows about a base layer type, one file per kind."""

from peft.layers.attention import FusedAttention, RotaryAttention
from peft.layers.block import Block, Sublayer
from peft.layers.conv import Conv
from peft.layers.embedding import Embedding
from peft.layers.linear import Conv1D, Eetq, Linear
from peft.layers.weight import MHA, Weight
from peft.layers.whole import Whole

# The first match wins; Linear also owns every quantized linear.
KINDS = [MHA, Embedding, Conv, RotaryAttention, FusedAttention, Conv1D, Eetq, Linear]


def find(base, param=None, wanted=()):
    """The kind for a base module, or for its parameter named `param`; None where no kind owns it.

    wanted: kinds that the method can adapt; one that takes modules whole takes every module so.
    """
    for kind in (Whole, Block):
        if kind.name in wanted:
            return kind()
    if param:
        return Weight(param)
    cls = _by_type.get(type(base))
    if cls is None:
        cls = next((kind for kind in KINDS if kind.owns(base)), None)
        if cls is not None:
            _by_type[type(base)] = cls
    if Sublayer.name in wanted and (cls is None or cls.name not in wanted) and Sublayer.owns(base):
        return Sublayer()
    return None if cls is None else cls()


_by_type: dict = {}  # asking every kind costs more than making a wrapper
