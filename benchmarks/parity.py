"""Results that both contenders must agree on: loss, gradients and logits from the same files and the same data."""

from __future__ import annotations

from pathlib import Path

import fixtures
import torch


def gradients(scratch: str, save_as: str, dtype: str, dora: bool = False, dropout: float = 0.0) -> dict:
    """Loss and adapter gradients of one step; dtype "reference" is fp32 arithmetic on the bf16 model's weights."""
    from peft import PeftModel

    torch.manual_seed(5)
    base = fixtures.rounded_base_model() if dtype == "reference" else fixtures.base_model(dtype)
    config = None
    if dropout:
        config = fixtures.lora_config(dropout, dora)
        config.base_model_name_or_path = None
    directory = fixtures.adapter_directory(scratch, 0, dora)
    model = PeftModel.from_pretrained(base, directory, is_trainable=True, config=config).train()
    ids = fixtures.tokens(4, 128)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {
        name.replace(".default", ""): parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    write(scratch, save_as, found)
    return {"loss": loss.item(), "gradient_norm": norm(found), "tensors": len(found)}


def mixed_logits(scratch: str, save_as: str, dtype: str, adapters: int) -> dict:
    """Last-token logits of a batch with one adapter per row."""
    model = fixtures.model_with_adapters(dtype, scratch, adapters)
    names = [str(index) for index in range(adapters)]
    with torch.no_grad():
        logits = model(input_ids=fixtures.tokens(adapters, 32), adapter_names=names, logits_to_keep=1).logits
    write(scratch, save_as, {"logits": logits.float()})
    return {}


def difference(scratch: str, left: str, right: str) -> dict:
    """How far `left` is from `right`, relative to the norm of `right`: over all tensors, and in the worst tensor."""
    a, b = read(scratch, left), read(scratch, right)
    if a.keys() != b.keys():
        raise ValueError(f"{left} and {right} hold different tensors: {sorted(a.keys() ^ b.keys())[:6]} ...")
    apart = {name: a[name] - b[name] for name in a}
    worst = max((apart[name].norm() / b[name].norm()).item() for name in a)
    return {"overall": norm(apart) / norm(b), "worst": worst}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm().item()


def write(scratch: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(scratch) / f"{name}.safetensors")


def read(scratch: str, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(scratch) / f"{name}.safetensors")


RESULTS = {"gradients": gradients, "mixed_logits": mixed_logits, "difference": difference}
