"""How a batch is extended by a prompt: the one place, whatever the method, the task and the model."""

import warnings

import torch

from peft.errors import AdapterError
from peft.integrations.training import shift_tokens_right
from peft.prompts.sizes import is_encoder_decoder

CACHE_NAMES = ("cache", "past_key_values")  # what forwards call their cache, newest first
SEGMENT_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # these keep token_type_ids
IGNORED = -100  # the label that a loss leaves out


def started(kwargs):
    """Whether the batch continues a cache, which then holds the prompt already."""
    caches = [kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None]
    return any(c.get_seq_length() for c in caches)


def size_of(kwargs):
    """(samples, tokens) of the batch. Raises AdapterError where it has neither ids nor embeddings."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[:2]
    raise AdapterError("A prompt needs input_ids or inputs_embeds to be put in front of.")


def into_cache(kwargs, base, length, task):
    """Arguments for a forward whose attention finds `length` virtual tokens in its cache."""
    side = "decoder_" if is_encoder_decoder(base) else ""
    kwargs = dict(kwargs)
    if kwargs.get(f"{side}attention_mask") is not None:
        kwargs[f"{side}attention_mask"] = _seen(kwargs[f"{side}attention_mask"], length)
    if kwargs.get(f"{side}position_ids") is not None:
        kwargs[f"{side}position_ids"] = kwargs[f"{side}position_ids"] + length
    if task not in SEGMENT_TASKS:
        _drop(kwargs, "token_type_ids")
    return kwargs


def into_embeds(kwargs, base, prompt, task, generating=False):
    """Arguments for a forward over `prompt` (batch, tokens, dim) followed by the input's embeddings."""
    size, length = size_of(kwargs), prompt.shape[1]
    kwargs = dict(kwargs)
    embeds = kwargs.pop("inputs_embeds", None)
    ids = kwargs.pop("input_ids", None)
    if embeds is None:
        embeds = base.get_input_embeddings()(ids)
    kwargs["inputs_embeds"] = torch.cat([prompt.to(embeds), embeds], dim=1)
    if kwargs.get("attention_mask") is not None:
        if kwargs["attention_mask"].ndim != 2:
            raise AdapterError("A prompt can extend an attention_mask of shape (batch, tokens) only.")
        kwargs["attention_mask"] = _seen(kwargs["attention_mask"], length)
    labels = kwargs.get("labels")
    if labels is not None and task != "SEQ_CLS" and not is_encoder_decoder(base) and labels.shape == size:
        kwargs["labels"] = torch.cat([labels.new_full((size[0], length), IGNORED), labels], dim=1)
    return _counted_anew(kwargs, length, task, generating)


def into_decoder(kwargs, base, prompt):
    """Arguments for an encoder-decoder's forward whose decoder, too, finds `prompt` (batch, tokens, dim) in front."""
    kwargs, length = dict(kwargs), prompt.shape[1]
    ids, embeds, labels = (kwargs.pop(n, None) for n in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    if embeds is None:
        if ids is None:
            ids = shift_tokens_right(labels, base.config.pad_token_id, base.config.decoder_start_token_id)
        embeds = base.get_input_embeddings()(ids)
    kwargs["decoder_inputs_embeds"] = torch.cat([prompt.to(embeds), embeds], dim=1)
    if kwargs.get("decoder_attention_mask") is not None:
        kwargs["decoder_attention_mask"] = _seen(kwargs["decoder_attention_mask"], length)
    if labels is not None:
        kwargs["labels"] = torch.cat([labels.new_full((len(labels), length), IGNORED), labels], dim=1)
    return kwargs


def after_embeds(kwargs, length, task):
    """Arguments for a forward that continues a cache which begins with `length` embedded virtual tokens."""
    kwargs = dict(kwargs)
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = _seen(kwargs["attention_mask"], length)
    return _counted_anew(kwargs, length, task, generating=True)


def _counted_anew(kwargs, length, task, generating):
    """Positions are left to the model, which counts the virtual tokens too; these are of segment 0."""
    if generating:
        kwargs.pop("position_ids", None)
    _drop(kwargs, "position_ids")
    segments = kwargs.get("token_type_ids")
    if segments is not None and task in SEGMENT_TASKS:
        kwargs["token_type_ids"] = torch.cat([segments.new_zeros(len(segments), length), segments], dim=1)
    else:
        _drop(kwargs, "token_type_ids")
    return kwargs


def _seen(mask, length):
    """A mask (batch, tokens), or (batch, 1, queries, tokens), with `length` tokens before it that all may see."""
    additive = mask.ndim == 4 and mask.is_floating_point()
    front = mask.new_full((*mask.shape[:-1], length), 0 if additive else 1)
    return torch.cat([front, mask], dim=-1)


def _drop(kwargs, name):
    if kwargs.pop(name, None) is not None:
        what = name.replace("_", " ").capitalize()
        warnings.warn(
            f"{what} are not supported for parameter efficient tuning. Ignoring {what.lower()}.", stacklevel=6
        )
