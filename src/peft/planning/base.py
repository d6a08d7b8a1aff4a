"""The base model on the meta device, from whatever describes one; and the batch that it is trained on."""

import copy
import os

import torch
from torch import nn

from peft import quant
from peft.errors import ConfigError
from peft.planning import packed

AUTO = {  # task type -> transformers' class with its output layer
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def on_meta(source, dtype, task, quantization):
    """A copy of the model on the meta device. `source`: see `plan`. task: a TaskType or None."""
    packed.check(quantization)
    if isinstance(source, (str, os.PathLike)):
        source = config_of(source)
    model = copied(source) if isinstance(source, nn.Module) else from_config(source, dtype, task)
    if dtype is not None:
        model.to(dtype)
    if quantization is None:
        return model
    return packed.pack(model, quantization, dtype or next(p.dtype for p in model.parameters()))


def config_of(folder):
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ConfigError(f"{os.fspath(folder)!r} is no folder with a config.json; nothing is downloaded for a plan.")
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def from_config(config, dtype, task):
    import transformers

    name = AUTO.get(getattr(task, "value", task))
    own = next(iter(getattr(config, "architectures", None) or ()), "")
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        if name is None and hasattr(transformers, own):
            return getattr(transformers, own)._from_config(config, dtype=dtype)
        return getattr(transformers, name or "AutoModelForCausalLM").from_config(config, dtype=dtype)


def copied(model):
    """The live model with every tensor on the meta device; nothing of its data is copied."""
    memo = {}
    for module in model.modules():
        if type(module) is not nn.Linear and quant.find(module).name and hasattr(module, "in_features"):
            memo[id(module)] = packed.stand_in(module)
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def batch_of(model, batch, length, given):
    """The arguments of a forward, as a dict: (batch, length) tokens with labels, and what is `given` beside them.

    A model that reads no tokens gets what is given, as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {name: empty(value) for name, value in (given or {}).items()}
    if getattr(base, "main_input_name", None) != "input_ids" or not hasattr(base, "config"):
        if not given:
            raise ConfigError(f"{type(base).__name__} reads no token ids: pass what its forward takes as `inputs`.")
        return given
    ids = torch.empty(batch, length, dtype=torch.long, device="meta")
    name = type(base).__name__
    if "QuestionAnswering" in name:
        labels = {"start_positions": ids[:, 0], "end_positions": ids[:, 0]}
    elif "SequenceClassification" in name:
        labels = {"labels": ids[:, 0]}
    else:
        labels = {"labels": ids} if "For" in name or "LMHead" in name else {}
    return {"input_ids": ids, **labels, **given}


def empty(value):
    """A tensor on the meta device of the same shape; other values stay."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def loss_of(model, inputs):
    """The model's own loss, or where it has none the sum of its first output."""
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = output if isinstance(output, torch.Tensor) else output[0]
    return loss.float().sum()
