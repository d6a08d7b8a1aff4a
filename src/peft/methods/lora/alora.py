"""aLoRA: a LoRA that acts on a prompt from its last invocation sequence on (arXiv 2504.12397).

What comes before is computed as in the base model, so keys and values that the base has cached can be used again.
"""

import warnings

import torch

from peft.core.adapter import Adapter
from peft.errors import AdapterError
from peft.methods.lora.lora import Lora
from peft.ops import lowrank

NEVER = 1 << 40  # a position that no sequence reaches


class ALora(Lora):
    """y + s·B(A x) on the tokens from the invocation on, y before it and where there is none."""

    kinds = ("linear",)
    title, converts = "aLoRA", False
    delta, merged_weight = Adapter.delta, Adapter.merged_weight  # depends on the position: cannot be merged

    def low_rank(self):
        return None

    def output(self, x, y):
        f, where = super().low_rank(), self._where(x)
        if where is None:
            return lowrank.add(self.base, y, x, f)
        if where.dtype is torch.bool:
            return y + lowrank.update(x, f, where.unsqueeze(-1)).to(y.dtype)
        tokens = x.reshape(-1, x.shape[-1])[where]
        more = lowrank.update(tokens, f).to(y.dtype)
        return y.reshape(-1, y.shape[-1]).index_add(0, where, more).view(y.shape)

    def _where(self, x):
        """The numbers of the tokens of x that the adapter acts on, counted over the whole batch, or None for all.

        While compiling: whether it does, for each token.
        """
        call = self.layer.state.call()
        invocations = call and call.arguments.get("invocations")
        if invocations is None:
            raise AdapterError(
                f"aLoRA {self.name!r} cannot tell where in the prompt it begins: {self.key} was not called through its "
                "PeftModel. Call that, not the base model or a layer of it."
            )
        where = invocations.where(self, x.shape[:-1], call.part, x.device)
        if where is False:
            raise AdapterError(
                f"aLoRA acts on some tokens of a sequence, but {self.key} got an input of shape {tuple(x.shape)} for "
                f"{invocations.size} sequences of {invocations.length} tokens. Take it out of target_modules."
            )
        return where


class Invocations:
    """Where in each sequence of one call aLoRA adapters begin. Computed once per adapter and shape, not per layer.

    size, length: of the batch and of its sequences. given: what the caller says, instead of what is in the ids.
    """

    def __init__(self, args, kwargs):
        self.given = kwargs.pop("alora_offsets", None)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        known = kwargs.get("inputs_embeds") if ids is None else ids
        self.size, self.length = (0, 0) if known is None or known.ndim < 2 else known.shape[:2]
        self.ids = ids if isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
        self.assisted = _given(kwargs, "assistant_model") or _given(kwargs, "prompt_lookup_num_tokens")
        self.refused = [n for n in ("num_beams", "prefill_chunk_size") if (_given(kwargs, n) or 1) > 1]
        self.kept = {}

    def where(self, adapter, shape, part, device):
        """As `ALora._where`, for a layer's input of that shape; False: it does not hold the sequences of the call.

        part: (row indices, rows of the whole input) where the input is only part of the batch.
        """
        key = (adapter.name, shape, part and part[1], device)
        if key not in self.kept:
            self.kept[key] = self._where(adapter, shape, part, device)
        return self.kept[key]

    def _where(self, adapter, shape, part, device):
        if self.refused:
            raise AdapterError(
                f"Generating with {self.refused[0]} is not supported for aLoRA ({adapter.name!r}): use one beam, and "
                "one prefill."
            )
        flat = len(shape) == 1 and shape[0] == self.size * self.length and part is None
        shape = (self.size, self.length) if flat else shape
        rows = shape[0] if part is None else part[1]
        if len(shape) != 2 or not self.size or rows % self.size:
            return False
        start = self._starts(adapter, device).repeat_interleave(rows // self.size)
        start = start if part is None else start[part[0]]
        # A shorter input is the end of the sequence, the rest being cached; a longer one goes on after it.
        skipped = 0 if shape[1] >= self.length else self.length - shape[1]
        skipped = self.length if skipped and self.assisted else skipped  # candidates for the tokens after it
        acts = torch.arange(skipped, skipped + shape[1], device=device) >= start[:, None]
        acts = acts.flatten() if flat else acts
        if torch.compiler.is_compiling():  # no shape may depend on the ids
            return acts
        return None if acts.all() else acts.flatten().nonzero().flatten()

    def _starts(self, adapter, device):
        """(size,): the position in each sequence where the adapter begins, or NEVER."""
        if self.given is not None:
            offsets = [0 if k is None else int(k) for k in self.given]
            if len(offsets) != self.size:
                raise AdapterError(
                    f"alora_offsets needs one number a sequence (None: no invocation): got {len(offsets)} for "
                    f"{self.size} sequences."
                )
            return torch.tensor([self.length - k if k > 0 else NEVER for k in offsets], device=device)
        if self.ids is None:
            warnings.warn(
                f"aLoRA {adapter.name!r} does nothing in this call: it looks for its invocation tokens in input_ids, "
                "which were not given. Say where it begins with alora_offsets=, one number of tokens a sequence.",
                stacklevel=2,
            )
            return torch.full((self.size,), NEVER, device=device)
        tokens = torch.tensor(adapter.config.alora_invocation_tokens, device=self.ids.device)
        if len(tokens) > self.length:
            return torch.full((self.size,), NEVER, device=device)
        found = (self.ids.unfold(1, len(tokens), 1) == tokens).all(-1)
        last = (found * torch.arange(1, found.shape[1] + 1, device=found.device)).amax(1)
        return torch.where(last > 0, last - 1, NEVER).to(device)


def _given(kwargs, name):
    """An option of generate, given itself or in a generation_config."""
    value = kwargs.get(name)
    return getattr(kwargs.get("generation_config"), name, None) if value is None else value
