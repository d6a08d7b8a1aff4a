"""AQLM: weights that are sums of rows of codebooks (arXiv 2401.06118)."""

from peft.quant.backend import loaded
from peft.quant.forward_only import ForwardOnly


class Aqlm(ForwardOnly):
    """codes (out/o, in/i, n) into codebooks (n, 2^bits, o, i), whose rows are o x i blocks; scales (out/o, 1, 1, 1)."""

    name = "aqlm"
    title = "AQLM"
    codes = "codes"

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("aqlm.inference", "QuantizedLinear"))

    def unpack(self, base, packed):
        books = base.codebooks.detach()
        codes = packed.long() % books.shape[1]  # stored with a sign
        blocks = sum(book[codes[..., n]] for n, book in enumerate(books))  # (out/o, in/i, o, i)
        return (blocks * base.scales.detach()).transpose(1, 2).flatten(2).flatten(0, 1)


BACKENDS = [Aqlm]
