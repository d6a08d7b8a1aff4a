"""Random tensors that a seed gives back, which a file need not hold: frozen bases, places in a matrix."""

import math

import torch

from peft.errors import CheckpointError, ConfigError
from peft.ops.remembered import remembered


def kaiming_uniform(shape, generator):
    """Uniform in ±√(6 / fan_in), float32 on the CPU: a seed gives upstream's values."""
    bound = math.sqrt(6 / math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@remembered
def places(shape, count, seed):
    """Rows and columns of `count` different places in a matrix, (2, count): a seed gives upstream's, in its order."""
    out, inp = shape
    chosen = torch.randperm(out * inp, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([chosen // inp, chosen % inp])


def check_count(field, count, adapter):
    """Raise ConfigError, naming the config's field, unless the adapter's layer has so many places."""
    out, inp = adapter.layer.shape
    if not 1 <= count <= out * inp:
        raise ConfigError(
            f"{field} asks for {count} numbers in {adapter.key}, which has {out * inp}. Choose between 1 and that."
        )


def largest(layers):
    """(out, in) of bases that have a corner for each of these layers."""
    return tuple(max(layer.shape[i] for layer in layers.values()) for i in (0, 1))


class SeededBases:
    """Part of an adapter class whose shared `bases` are in a file only if the config says save_projection."""

    bases: tuple[str, ...] = ()

    @classmethod
    def unsaved(cls, c):
        return () if c.save_projection else cls.bases

    @classmethod
    def from_file(cls, c, tensors, adapters):
        held = [k for k in tensors if k.endswith(cls.bases)]
        if c.save_projection and len(held) < len(cls.bases):
            raise CheckpointError(
                f"The config says save_projection=True, but the file holds no {' and '.join(cls.bases)}. If they were "
                "left out on purpose, set save_projection=False in its adapter_config.json: they follow from the seed."
            )
        return tensors if c.save_projection else {k: v for k, v in tensors.items() if k not in held}


def check_same_bases(configs):
    """Raise ConfigError unless all adapters of a model have their bases from the same seed and file."""
    for name in ("projection_prng_key", "save_projection"):
        if len(values := {getattr(c, name) for c in configs}) > 1:
            method = configs[0].peft_type.value
            raise ConfigError(f"All {method} adapters of a model need the same {name}, got {sorted(values)}.")
