"""EETQ: int8 with a scale for each output, in the order that its GPU kernel reads."""

from peft.quant.backend import loaded
from peft.quant.forward_only import ForwardOnly


class Eetq(ForwardOnly):
    """weight (in, out) int8, weight_scales (out,) float16. Only the kernel knows the order of the bytes."""

    name = "eetq"
    title = "EETQ"
    codes, scales = "weight", "weight_scales"

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("transformers.integrations.eetq", "EetqLinear"))

    def inputs(self, base):
        return len(base.weight)


class OwnEetq(Eetq):
    """The layers of the package itself, older than those of transformers 5."""

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("eetq", "EetqLinear") + loaded("eetq.modules", "EetqLinear"))


BACKENDS = [Eetq, OwnEetq]
