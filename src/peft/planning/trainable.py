"""What is trained, in groups: the layers of one name in all blocks make one group."""

import re
from dataclasses import dataclass

from peft.core.slots import wrappers_in
from peft.core.wrappers import ModulesToSaveWrapper

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """Trained tensors of one kind: "method" (the adapter's own), "head" (modules trained whole), "token rows", or
    "weights" (of the base itself).

    name     a path in the model, with * for the number of a block
    tensors, numbers, bytes   how many tensors, how many numbers in them, and their size
    """

    kind: str
    name: str
    tensors: int
    numbers: int
    bytes: int


def groups(model):
    """The groups of all trained parameters of a model, in its order."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {id(module): path for path, module in model.named_modules()}
    layers, extras = wrappers_in(base)
    kinds = {names[id(layer)]: "method" for layer in layers.values()}
    for wrapper in extras.values():
        kinds[names[id(wrapper)]] = "head" if isinstance(wrapper, ModulesToSaveWrapper) else "token rows"
    of_base = {id(p) for layer in layers.values() for p in layer.get_base_layer().parameters()}
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        owner = max((path for path in kinds if name.startswith(f"{path}.")), key=len, default=None)
        kind = kinds.get(owner, "method" if base is not model else "weights")
        if kind == "method" and id(p) in of_base:
            kind = "weights"
        path = NUMBER.sub("*", owner or name.rpartition(".")[0]).removeprefix("base_model.model.")
        found.setdefault((kind, path), []).append(p)
    return tuple(
        Group(kind, path, len(ps), sum(p.numel() for p in ps), sum(p.nbytes for p in ps))
        for (kind, path), ps in found.items()
    )
