"""Where ReFT acts: positions among the tokens of each row's prompt, whatever its padding, its cache and its labels."""

import contextlib

import torch
import torch.nn.functional as F

from peft.core.around import around_forwards, by_name
from peft.errors import AdapterError
from peft.prompts.insert import CACHE_NAMES

IGNORED = -100  # the label of a token that no loss counts


class Prompt:
    """The tokens of the prompt in one stack of blocks: in one forward, or in all forwards of a generate.

    mask     (rows, columns) bool, True for tokens of the prompt; None: all columns are
    columns  how many columns the prompt has; None until the first block has run
    start    the column at which the hidden states of this forward begin: those before are in a cache
    """

    def __init__(self, mask=None, columns=None, start=0):
        self.mask, self.columns, self.start = mask, columns, start
        self._found = {}

    def find(self, wanted, rows, length, device):
        """Where hidden states (rows, length, width) are at the wanted positions; None where none of them can be.

        wanted: numbers of tokens in the prompt, from 0 on, negative ones from its end; None: all. Returns (columns,
        valid), (rows, wanted) each, in which no row has a valid column twice; for all (None, valid) of (rows, length).
        """
        if self.columns is None:
            self.columns = self.start + length
        if self.start >= self.columns:
            return None
        key = (wanted, rows, length, self.start, device)
        if key not in self._found:
            mask = self._mask_of(rows, device)
            places = _every if wanted is None else _some
            self._found[key] = places(mask, wanted, length, self.start)
        return self._found[key]

    def _mask_of(self, rows, device):
        """The mask for that many rows: beams are further rows of their sample. AdapterError if it does not fit."""
        if self.mask is None:
            return torch.ones(rows, self.columns, dtype=torch.bool, device=device)
        count, columns = self.mask.shape
        if columns != self.columns or rows % count:
            raise AdapterError(
                f"attention_mask has the shape {tuple(self.mask.shape)}, but a block got {rows} rows of {self.columns} "
                "hidden states, so that ReFT cannot tell which are tokens. Take blocks that read something else than "
                "these tokens out of target_modules."
            )
        return self.mask.to(device).repeat_interleave(rows // count, 0)


def _every(mask, wanted, length, start):
    """(None, which columns from `start` on are the prompt's)."""
    valid = mask[:, start : start + length]
    return None, F.pad(valid, (0, length - valid.shape[1]))


def _some(mask, wanted, length, start):
    """(columns, valid) of the wanted tokens of each row; one that is wanted from both ends counts from the front."""
    numbers = torch.tensor(wanted, device=mask.device)
    count = mask.sum(1, keepdim=True)
    places = torch.where(numbers < 0, count + numbers, numbers)  # (rows, wanted), counted in tokens
    valid = (places >= 0) & (places < count)
    if (front := [n for n in wanted if n >= 0]) and len(front) < len(wanted):
        known = (places.unsqueeze(-1) == torch.tensor(front, device=mask.device)).any(-1)
        valid = valid & ~(known & (numbers < 0))
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # the columns of tokens, then those of padding
    columns = order.gather(1, places.clamp(0, mask.shape[1] - 1)) - start
    return columns.clamp(0, length - 1), valid & (columns >= 0) & (columns < length)


class Prompts:
    """The prompts of one call, of the model's own blocks (those of the decoder, if it has both) and of its encoder's.

    given    the call's arguments by name
    lengths  (rows,) number of each row's tokens that are its prompt; None: what comes before the first label, in a row
             that has one and does not begin with it; else the whole row
    """

    def __init__(self, model, given, lengths):
        self.model, self.given, self.lengths = model, given, lengths
        self.has_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.mask_name = "decoder_attention_mask" if self.has_encoder else "attention_mask"
        self._prompts = {}

    def of(self, in_encoder):
        """The `Prompt` in the encoder's blocks, or in the model's own."""
        if in_encoder not in self._prompts:
            self._prompts[in_encoder] = Prompt(_tokens(self.given, "attention_mask")) if in_encoder else self._own()
        return self._prompts[in_encoder]

    def _own(self):
        """That of a forward; one that continues a cache has none, as its tokens come after the prompt."""
        if _cached(self.given)[1]:
            return Prompt(columns=0)
        mask = _tokens(self.given, self.mask_name)
        if self.lengths is not None:
            return Prompt(self._shortened(mask, self.given))
        labels = self.given.get("labels")
        if labels is None or labels.ndim != 2 or not self._generates():
            return Prompt(mask)
        mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        before = ((labels != IGNORED).cumsum(1) == 0).to(mask.device)
        if self.has_encoder:  # the label of a column is the token of the next one
            return Prompt(mask & F.pad(before[:, :-1], (1, 0), value=True))
        own = mask & before
        return Prompt(torch.where(own.any(1, keepdim=True), own, mask))

    def _generates(self):
        """Whether its labels are the tokens that it is to write, not what is to be said of each token."""
        return hasattr(self.model, "can_generate") and self.model.can_generate()

    def _shortened(self, mask, given):
        """The mask without what comes after the given lengths."""
        if mask is None:
            mask = torch.ones(self._size(given), dtype=torch.bool, device=self.lengths.device)
        if len(mask) % len(self.lengths):
            raise AdapterError(
                f"prompt_lengths has {len(self.lengths)} numbers for {len(mask)} rows: one a sample is needed."
            )
        lengths = self.lengths.to(mask.device).repeat_interleave(len(mask) // len(self.lengths))
        return mask & (mask.cumsum(1) <= lengths.unsqueeze(1))

    def _size(self, given):
        """(rows, columns) of the tokens that the model's own blocks read in a call, or None where none are named."""
        names = ("inputs_embeds", "input_ids")
        names = [f"decoder_{n}" for n in names] if self.has_encoder else [*names, "inputs"]
        tokens = next((given[n] for n in names if given.get(n) is not None), None)
        return None if tokens is None else tokens.shape[:2]

    # -- generate ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def during_generate(self):
        """Follow the forwards of a generate of the model: the prompt is what its first one begins with."""
        self._prompts.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(around_forwards(self.model, self._begin))
            if self.has_encoder:  # which runs before, on its own
                stack.enter_context(around_forwards(self.model.get_encoder(), self._begin_encoder))
            yield

    def _begin_encoder(self, args, kwargs):
        self._prompts[True] = Prompt(_tokens(by_name(self.model.get_encoder(), args, kwargs), "attention_mask"))

    def _begin(self, args, kwargs):
        """A forward of the model begins."""
        now = by_name(self.model, args, kwargs)
        if (size := self._size(now)) is None:
            raise AdapterError(f"ReFT found no tokens among what generate gives {type(self.model).__name__}.")
        start, length = _cached(now)[0], size[1]
        if (prompt := self._prompts.get(False)) is None:
            self._prompts[False] = self._first(now, start, length)
        else:  # without a cache it reads all from the start, the prompt and more
            prompt.start = start or (0 if length > prompt.columns else prompt.columns)

    def _first(self, now, start, length):
        """The prompt, as generate was given it; its first forward may read drafted tokens behind it."""
        columns = start + length
        if not self.has_encoder and (size := self._size(self.given)) is not None:
            columns = size[1]
        if start + length < columns:
            raise AdapterError(
                f"generate reads its prompt of {columns} tokens in parts, the first of {length}. ReFT needs it in one: "
                "leave out prefill_chunk_size."
            )
        # For a static cache generate makes another mask of the one that it was given.
        mask = _tokens(self.given if self.given.get(self.mask_name) is not None else now, self.mask_name)
        mask = mask if mask is None else mask[:, :columns]
        return Prompt(mask if self.lengths is None else self._shortened(mask, now), columns, start)


def _tokens(given, name):
    """An attention mask as (rows, columns) bool, or None. Raises AdapterError for one that does not tell the tokens."""
    mask = given.get(name)
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        what = f"the shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise AdapterError(
            f"ReFT needs to know which tokens are padding, but {name} is {what}. Pass it as (samples, tokens), to "
            "generate too."
        )
    return mask.bool()


def _cached(given):
    """(number of columns in the cache that a forward continues, whether there are any): state spaces do not count."""
    cache = next((given[n] for n in CACHE_NAMES if given.get(n) is not None), None)
    if cache is None:
        return 0, False
    try:
        count = int(cache.get_seq_length())
    except ValueError:
        return 0, cache.has_previous_state()
    return count, count > 0
