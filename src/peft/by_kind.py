"""Classes that stand for one method on one kind of base layer, as upstream's `loha.Conv2d`, for isinstance and by hand.

`getattr(by_kind, "loha.conv2")` makes such a class when it is first asked for: method, kind, and for convolutions the
number of spatial dimensions. "lora.4bit", "lora.gptq" and their like are linear layers that a library stores.
"""

import functools
import re

from peft import registry
from peft.core.of_kind import OfKind

NAMES = {"linear": "Linear", "embedding": "Embedding", "mha": "MultiheadAttention", "param": "ParamWrapper"}
QUANTIZED = {  # the title of the class, and the backend
    "4bit": ("Linear4bit", "bnb 4bit"),
    "8bit": ("Linear8bitLt", "bnb 8bit"),
    "aqlm": ("AqlmLoraLinear", "aqlm"),
    "awq": ("AwqLoraLinear", "awq"),
    "eetq": ("EetqLoraLinear", "eetq"),
    "gptq": ("GPTQLoraLinear", "gptq"),
    "hqq": ("HqqLoraLinear", "hqq"),
    "inc": ("IncLoraLinear", "inc"),
    "te": ("TeLinear", "te"),
    "torchao": ("TorchaoLoraLinear", "torchao"),
}


def __getattr__(name):
    return _made(name.replace(":", "."))


@functools.cache
def _made(name):
    found = re.fullmatch(rf"([a-z_0-9]+)\.({'|'.join([*NAMES, *QUANTIZED, 'conv'])})([123]?)", name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method, kind, spatial = registry.method(found[1].upper()), found[2], found[3]
    title, backend = NAMES.get(kind) or (f"Conv{spatial}d" if spatial else "_ConvNd"), ""
    if kind in QUANTIZED:
        (title, backend), kind = QUANTIZED[kind], "linear"
    about = {
        "__qualname__": name.replace(".", ":"),  # without dots: by it pickle finds the class
        "__module__": __name__,
        "__doc__": f"{method.name} on one kind of layer: {title}(base_layer, adapter_name, config, **settings).",
    }
    dimensions = int(spatial) if spatial else None
    rule = (kind, dimensions, backend)
    return OfKind(title, (method.tuner.layer_cls,), about, rule=rule, config=method.config)
