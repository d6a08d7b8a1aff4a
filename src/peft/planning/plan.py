"""plan: the memory of a training step, from the real code run on shapes."""

import copy
import functools
from dataclasses import dataclass, field

import torch

from peft.core.calls import is_checkpointing
from peft.errors import ConfigError, nearest
from peft.planning.base import batch_of, loss_of, on_meta
from peft.planning.optimizers import OPTIMIZERS
from peft.planning.packed import numbers_in
from peft.planning.pretend import on_shapes
from peft.planning.step import run
from peft.planning.tracker import Tracker
from peft.planning.trainable import Group, groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """Bytes that a training step takes. At the worst moment not all parts are there, and temporary tensors are.

    weights       of the model and the adapter, as they are stored
    gradients, optimizer   of all that is trained
    activations   what the model's body keeps for the backward pass
    logits        the output layer, the loss and their gradients, at their largest
    evaluation    forward without gradients of `eval_batch` samples, at its largest; 0: none asked for
    peak          all that is alive at the worst moment, temporary tensors included; that moment is in the `phase`
                  "forward", "backward", "optimizer" (its step) or "evaluation"
    trainable     the trained parameters in Groups; `trained` and `total` count numbers
    """

    batch: int
    length: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    evaluation: int
    peak: int
    phase: str
    trainable: tuple[Group, ...]
    total: int
    _step: object = field(repr=False, compare=False)

    @property
    def trained(self):
        return sum(group.numbers for group in self.trainable)

    def at(self, batch=None, length=None):
        """The plan for another size; the model is not built again."""
        return self._step(batch or self.batch, length or self.length)

    def largest(self, what, memory, most=1 << 20):
        """The largest `what` ("batch" or "length"), up to `most`, with a peak of at most `memory` bytes; 0: none."""
        if what not in ("batch", "length"):
            raise ConfigError(f"what must be 'batch' or 'length', got {what!r}.")
        peaks = {}

        def peak(n):
            if n not in peaks:
                peaks[n] = self.at(**{what: n}).peak
            return peaks[n]

        low, high = 0, most + 1  # low fits, high does not
        guess = min(getattr(self, what), most)
        while high - low > 1:
            if peak(guess) <= memory:
                low = guess
            else:
                high = guess
            if low == 0:
                guess = high // 2 or 1
                continue
            # Peaks grow along a line, or faster: from the two sizes tried that are nearest to the answer.
            tried = sorted(peaks, key=lambda n: abs(peaks[n] - memory))[:2]
            if len(tried) < 2:
                guess = min(2 * low, high - 1)
                continue
            a, b = sorted(tried)
            slope = max((peaks[b] - peaks[a]) / (b - a), 1e-9)
            guess = int(a + (memory - peaks[a]) / slope)
            guess = min(max(guess, low + 1), high - 1)
        return low


def plan(
    model_or_config,
    peft_config=None,
    *,
    batch=1,
    length=512,
    dtype=None,
    quantization=None,
    optimizer="adamw",
    gradient_checkpointing=False,
    accumulate=1,
    eval_batch=0,
    device=None,
    inputs=None,
    loss=None,
    wrap=None,
):
    """The memory that training would take, as a Plan: nothing is allocated, no weight is read.

    model_or_config: a live model, a transformers config, a folder with a config.json, or any nn.Module.
    peft_config: a config of any method; None: the model as it is, so a base model is fine-tuned whole.
    batch, length: samples and tokens of a forward. dtype: of the base, a torch.dtype, "fp32", "bf16" or "fp16";
    None: as it is, or as its config says.
    quantization: None, "nf4", "fp4" (also "nf4_double", "fp4_double") or "int8": the linear layers but the last.
    optimizer: "adamw" as torch.optim.AdamW runs it by default, "adamw_fused", "adamw_8bit", or "sgd" without momentum.
    accumulate: forwards for an optimizer step. eval_batch: samples of a forward without gradients that comes between.
    device: where it would run; None: "cuda" if there is one, else "cpu".
    inputs: further arguments of the forward, or a function (batch, length) -> all of them, where values matter no more
    than in any tensor on the meta device. loss: a function (model, inputs) -> loss, instead of the model's own.
    wrap: a function (base model) -> model to train, instead of `get_peft_model` with peft_config.

    Raises ConfigError for unknown names; what the model or the method raise on the meta device comes through.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r} is not known; nearest: {nearest(optimizer, OPTIMIZERS)}.")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; nearest: {nearest(dtype, DTYPES)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = on_meta(model_or_config, DTYPES.get(dtype, dtype), getattr(peft_config, "task_type", None), quantization)
    with on_shapes(Tracker(), device):
        model = (wrap or functools.partial(wrapped, config=peft_config))(base).train()
        if gradient_checkpointing or is_checkpointing(model):
            checkpointed(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("Nothing is trained: give a peft_config, or let some parameter require a gradient.")
    make = inputs if callable(inputs) else lambda b, n: batch_of(model, b, n, inputs)
    measure = functools.partial(
        run, model, make, loss or loss_of, OPTIMIZERS[optimizer], accumulate, eval_batch, device
    )

    trainable, total = groups(model), numbers_in(model)

    def step(batch, length):
        return Plan(batch, length, **measure(batch, length), trainable=trainable, total=total, _step=step)

    return step(batch, length)


def wrapped(base, config):
    if config is None:
        return base
    from peft.wrap import get_peft_model

    try:
        return get_peft_model(base, copy.deepcopy(config))
    except (RuntimeError, ConfigError):  # values decide something in the start of a few methods: leave it out
        return get_peft_model(base, copy.deepcopy(config), low_cpu_mem_usage=True)


def checkpointed(model):
    """As transformers' Trainer does it."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing to switch on.")
    what = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # since transformers 5.24
    enable = getattr(model, f"{what}_checkpointing_enable")
    enable(**{f"{what}_checkpointing_kwargs": {"use_reentrant": False}})
    model.enable_input_require_grads()
