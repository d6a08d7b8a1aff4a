"""What all methods share whose update of a linear layer is a product of two factors, whatever those are made from."""

from peft.core.adapter import Additive
from peft.ops import lowrank


class Factored(Additive):
    """y + s·B(A(dropout(x))): a method says in `low_rank` what A (r, in) and B (out, r) are."""

    def output(self, x, y):
        return lowrank.add(self.base, y, x, self.low_rank())

    def delta_weight(self):
        f = self.low_rank().absorbed()
        return (f.B @ f.A) * f.s
