"""LoRA+: B learns faster than A (arXiv 2402.12354)."""

from torch import nn

EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(model, optimizer_cls, *, lr, loraplus_lr_ratio, **kwargs):
    """An `optimizer_cls` over the trained parameters of a model, in four groups.

    lr: of A and everything else. loraplus_lr_ratio: how many times faster B and vectors learn, at least 1; 16 is usual.
    loraplus_lr_embedding: of LoRA on embeddings, default 1e-6. loraplus_weight_decay: default 0; biases and norms have
    none. Other kwargs go to the optimizer.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    norms = {
        f"{path}.{n}" for path, m in model.named_modules() if is_norm(m) for n, _ in m.named_parameters(recurse=False)
    }
    slow, embeddings, fast, fast_without_decay = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if ".lora_embedding_" in name:
            embeddings.append(p)
        elif ".lora_B." not in name and p.ndim != 1:
            slow.append(p)
        elif "bias" in name or name in norms:
            fast_without_decay.append(p)
        else:
            fast.append(p)
    optimizer = optimizer_cls(
        [
            {"params": slow, "weight_decay": decay, "lr": lr},
            {"params": embeddings, "weight_decay": decay, "lr": embedding_lr},
            {"params": fast, "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
            {"params": fast_without_decay, "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__name__ in EIGHT_BIT:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # 8-bit states of embeddings are unstable
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def is_norm(module):
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
