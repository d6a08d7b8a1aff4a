"""Which optional libraries are installed. Nothing is imported to find out."""

import functools
import importlib.metadata
import importlib.util
import platform

import torch
from packaging.version import InvalidVersion, Version


@functools.lru_cache
def _installed(module):
    return importlib.util.find_spec(module) is not None


@functools.lru_cache
def _version(distribution):
    """The installed version of a distribution; None where it is not installed or has no proper version."""
    try:
        return Version(importlib.metadata.version(distribution))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def _at_least(distribution, minimum):
    version = _version(distribution)
    return version is not None and version >= Version(minimum)


def is_bnb_available():
    return _installed("bitsandbytes")


def is_bnb_4bit_available():
    return is_bnb_available()


def is_gptqmodel_available():
    """Raises ImportError where gptqmodel or optimum is installed but too old."""
    if not _installed("gptqmodel"):
        return False
    for distribution, minimum in (("gptqmodel", "7.0.0"), ("optimum", "1.24.0")):
        if not _at_least(distribution, minimum):
            found = _version(distribution) or "none"
            raise ImportError(f"GPTQ layers need {distribution}>={minimum}, found {found}; upgrade {distribution}.")
    return True


def is_optimum_available():
    return _installed("optimum")


def is_aqlm_available():
    return _installed("aqlm")


def is_eetq_available():
    return _installed("eetq")


def is_hqq_available():
    return _installed("hqq")


def is_inc_available():
    return _installed("neural_compressor")


def is_diffusers_available():
    return _installed("diffusers")


def is_te_available():
    return _installed("transformer_engine")


def is_te_pytorch_available():
    return is_te_available() and importlib.util.find_spec("transformer_engine.pytorch") is not None


def is_torchao_available():
    """Raises ImportError where torchao is installed but too old."""
    if not _installed("torchao"):
        return False
    if not _at_least("torchao", "0.16.0"):
        raise ImportError(f"torchao layers need torchao>=0.16.0, found {_version('torchao')}; upgrade torchao.")
    return True


def is_torchao_ge_v0_18_0():
    return _at_least("torchao", "0.18.0")


def is_torch_tpu_available(check_device=True):
    """Whether torch_xla is installed and, with check_device, has a device."""
    if not _installed("torch_xla"):
        return False
    if not check_device:
        return True
    import torch_xla.core.xla_model as xm

    try:
        xm.xla_device()
    except RuntimeError:
        return False
    return True


def is_xpu_available(check_device=False):
    """Whether torch knows an Intel GPU; check_device: whether one answers."""
    if platform.system() == "Darwin" or not hasattr(torch, "xpu") or not torch.xpu.is_available():
        return False
    if not check_device:
        return True
    try:
        return torch.xpu.device_count() > 0
    except RuntimeError:
        return False


is_transformers_ge_v5 = _at_least("transformers", "5.0.0.dev0")
is_transformers_ge_v5_1_0 = _at_least("transformers", "5.1.0")
is_transformers_ge_v5_4_0 = _at_least("transformers", "5.4.0")
is_transformers_ge_v5_6_0 = _at_least("transformers", "5.6.0")
is_transformers_ge_v5_13_0 = _at_least("transformers", "5.13.0")
is_transformers_ge_v5_17_0 = _at_least("transformers", "5.17.0")
is_transformers_le_4_53 = _version("transformers") is not None and not _at_least("transformers", "4.54.0.dev0")
is_transformers_dtensor_tp = is_transformers_ge_v5_17_0
