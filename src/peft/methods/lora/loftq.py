"""LoftQ: a quantized base, and A and B that start as what quantizing took away (arXiv 2310.08659).

With sample inputs, as what matters most to them of what it took away (QERA, arXiv 2410.06040).

init_lora_weights="loftq" on a float model does both: the base weight W becomes Q, the values that W has once quantized,
and s·BA the part of rank r nearest to W − Q. Save the base and load it quantized, or quantize the original and call
`replace_lora_weights_loftq`, which leaves a quantized base as it is.
"""

import os
from dataclasses import dataclass, field

import torch

from peft.core.merging import original_weight
from peft.core.validate import check_range
from peft.errors import AdapterError, ConfigError
from peft.methods.lora.inits import SEED, pissa
from peft.methods.lora.inputs import mean_of_inputs
from peft.storage.shards import Shards

BLOCK = 64  # weights that share a scale in NF4
MOMENTS = 2**28  # bytes of second moments that are held at a time
MORE, ITERATIONS = 32, 4  # vectors beside those that are wanted, and rounds, until these are found
TINY = 1e-12  # in place of a size of zero
NOTHING = 1e-6  # a residual this small, relative to W: the base was quantized before


@dataclass
class LoftQConfig:
    """Bits of the quantized base, and how often it and the factors are fitted to each other."""

    loftq_bits: int = field(default=4, metadata={"help": "4: NF4, as bitsandbytes makes it; 8: int8 rows"})
    loftq_iter: int = field(default=1, metadata={"help": "alternating steps"})

    def __post_init__(self):
        if self.loftq_bits not in (4, 8):
            raise ConfigError(f"LoftQConfig.loftq_bits must be 4 or 8, got {self.loftq_bits!r}.")
        check_range(self, "loftq_iter", 1)


def rounded(W, bits):
    """W (rows, columns) in float32 as it is after quantizing; shape and dtype stay."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ConfigError("init_lora_weights='loftq' quantizes with bitsandbytes. Install it.") from error
    if bits == 8:
        return functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(W.half())[:2])
    flat = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % BLOCK)).view(-1, BLOCK)
    codes, state = functional.quantize_4bit(flat, quant_type="nf4", compress_statistics=False)
    return functional.dequantize_4bit(codes, state).flatten()[: W.numel()].view(W.shape)


def start(adapter, c):
    """Quantize the base weight under an adapter; (A0, B0) that take its place, or None for one that was quantized."""
    layer, kind = adapter.layer, adapter.kind
    if layer.backend.name:
        return None
    if kind.name not in ("linear", "embedding"):
        raise ConfigError(f"init_lora_weights='loftq' is for linear layers and embeddings; {adapter.key} is another.")
    bits, W = c.loftq_config.loftq_bits, layer.base_weight().float()
    whole, known = kind.uncanon(W), rounded(kind.uncanon(W), c.loftq_config.loftq_bits)
    if (whole - known).norm() <= NOTHING * whole.norm():
        return None
    part = torch.zeros_like(W)
    for _ in range(c.loftq_config.loftq_iter):
        Q = kind.canon(rounded(kind.uncanon(W - part).contiguous(), bits))
        A, B = pissa(W - Q, adapter.r, adapter.scaling)
        part = adapter.scaling * B @ A
    layer.set_base_weight(Q)
    return A, B


@torch.no_grad()
def replace_lora_weights_loftq(peft_model, model_path=None, adapter_name="default", callback=None, run_model=None):
    """Set A and B of a model with a quantized base to what the quantization took away, in one step of LoftQ.

    model_path: the safetensors file, or the folder or hub id, of the original model; None: where the base came from.
    callback(model, layer name) is asked after each layer, for example whether the loss fell; False undoes that layer.
    run_model(): forwards over sample inputs, some thousand tokens of what the adapter is for. A and B then give back
    the layers' outputs for such inputs as well as rank r can, not their weights (QERA). It is called more than once
    where the second moments of the inputs, 4·in² bytes a layer, do not fit into 256 MiB.
    Raises AdapterError where no layer is quantized, CheckpointError where the original does not fit, and ConfigError
    where run_model leaves a layer out or gives it numbers that are not finite.
    """
    layers = {path: layer for path, layer in peft_model.base_model.layers.items() if adapter_name in layer.adapters}
    layers = {p: layer for p, layer in layers.items() if layer.backend.name and layer.lora_A is not None}
    if not layers:
        raise AdapterError(
            f"No LoRA of the name {adapter_name!r} is on a quantized layer: there is nothing to replace."
        )
    source = model_path or getattr(peft_model.config, "_name_or_path", None)
    if not source:
        raise AdapterError("model_path is needed: the base model does not say where it was loaded from.")
    shards = Shards(os.fspath(source))
    names = {path: f"{layer.adapters[adapter_name].key}.weight" for path, layer in layers.items()}
    keys = shards.named(list(names.values()), getattr(peft_model.get_base_model(), "base_model_prefix", ""))
    factors = {path: layer.adapters[adapter_name].factors() for path, layer in layers.items()}
    before = {path: [t.clone() for t in of] for path, of in factors.items()}
    try:
        for part in parts(layers) if run_model else [layers]:
            moments = mean_of_inputs(peft_model, part, run_model, second_moment) if run_model else {}
            for path, layer in part.items():
                adapter = layer.adapters[adapter_name]
                W = layer.base_weight().float()
                residual = original_weight(shards, keys[names[path]], layer.get_base_layer()).to(W) - W
                fill(factors[path], nearest(residual, adapter.r, adapter.scaling, moments.pop(path, None)))
                if callback is not None and not callback(peft_model, names[path].removesuffix(".weight")):
                    fill(factors[path], before[path])
    except BaseException:
        for path in layers:
            fill(factors[path], before[path])
        raise


def fill(factors, values):
    """Set A and B, as far as there are values: a matrix has no more components than rows or columns."""
    (A, B), (new_A, new_B) = factors, values
    A[: len(new_A)] = new_A
    B[:, : len(new_A)] = new_B


def nearest(W, r, s, moments=None):
    """A (r, in), B (out, r): s·BA is nearest to W, or, with the inputs' second moments (in, in), so in its outputs.

    The nearest outputs are those projected on their r principal directions U: BA = U·Uᵀ·W.
    """
    if moments is None:
        return pissa(W, r, s)
    U = principal(lambda Q: W @ (moments @ (W.t() @ Q)), len(W), r, W)
    A = U.t() @ W
    size = (A.norm(dim=1) / s).sqrt()  # A and B of the same size
    return A / (s * size.clamp(min=TINY))[:, None], U * size


def principal(product, n, r, like):
    """The r principal eigenvectors (n, r) of a symmetric n x n matrix, given its product with others (n, k)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        Q = torch.randn(n, min(n, r + MORE)).to(like)
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(product(Q)).Q
    return Q @ torch.linalg.eigh(Q.t() @ product(Q)).eigenvectors.flip(1)[:, :r]


def second_moment(x):
    x = x.float()
    return x.t() @ x


def parts(layers):
    """The layers, some at a time, whose second moments fit into the bounds."""
    part, size = {}, 0
    for path, layer in layers.items():
        more = 4 * layer.in_features**2
        if part and size + more > MOMENTS:
            yield part
            part, size = {}, 0
        part[path], size = layer, size + more
    if part:
        yield part
