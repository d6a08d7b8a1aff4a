"""Helpers around models with adapters: signatures for introspection, temporary scaling, input casting."""

import contextlib
import inspect
from types import MethodType

from peft.config import PeftConfig
from peft.core.layer import AdapterLayer
from peft.errors import PeftError
from peft.functional import holders
from peft.kappa import KappaTuneSelector as KappaTuneSelector
from peft.kappa import find_kappa_target_modules as find_kappa_target_modules

GENERIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def update_forward_signature(model):
    """Let inspect.signature(model.forward), and help(), show what the base model's forward takes."""
    _adopt(model, "forward")


def update_generate_signature(model):
    """Let inspect.signature(model.generate), and help(), show what the base model's generate takes."""
    _adopt(model, "generate")


def update_signature(model, method="all"):
    """Do so for "forward", "generate" or "all". Raises ValueError for other words."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        _adopt(model, name)


def _adopt(model, name):
    kinds = {p.kind for p in inspect.signature(getattr(model, name)).parameters.values()}
    if not kinds >= GENERIC:
        return
    shown = getattr(model.get_base_model(), name)

    def call(self, *args, **kwargs):
        return getattr(type(self), name)(self, *args, **kwargs)

    signature = inspect.signature(shown)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    named = [p.replace(kind=p.kind) for p in signature.parameters.values()]
    if named and named[0].kind is not inspect.Parameter.POSITIONAL_ONLY:
        this = this.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    call.__name__, call.__doc__ = name, shown.__doc__
    call.__signature__ = signature.replace(parameters=[this, *named])
    setattr(model, name, MethodType(call, model))


def check_if_peft_model(model_name_or_path):
    """Whether a folder or hub repository holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (PeftError, ValueError, KeyError, OSError):
        return False
    return True


@contextlib.contextmanager
def rescale_adapter_scale(model, multiplier):
    """While inside, all adapters with a scaling act `multiplier` times as strongly. Raises ValueError for none."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    scalings = [h.scaling for h in holders(model) if isinstance(h, AdapterLayer) and "scaling" in h.__dict__]
    if not scalings:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [dict(s) for s in scalings]
    try:
        for scaling in scalings:
            scaling.update({name: s * multiplier for name, s in scaling.items()})
        yield
    finally:
        for scaling, old in zip(scalings, before):
            scaling.update(old)


@contextlib.contextmanager
def disable_input_dtype_casting(model, active=True):
    """While inside, adapters compute in the dtype of their input instead of that of their weights.

    For weights that are stored in a dtype nothing computes in, as with diffusers' layerwise casting to float8.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.cast_input_dtype_enabled = old


class MontecloraTrainerMixin:
    """Adds MonteCLoRA's own loss to a Trainer's: `class MyTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The Trainer's loss plus the mean of `_get_monteclora_loss` over the model's LoRA tuners."""
        from peft.methods.lora.model import LoraModel

        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        tuners = [m for m in model.modules() if isinstance(m, LoraModel)]
        more = sum(m._get_monteclora_loss() for m in tuners) / max(len(tuners), 1)
        return (found[0] + more, found[1]) if return_outputs else found + more


class DoraCaching:
    """A context kept for old code. DoRA's norms are always kept until one of their tensors changes."""

    def __init__(self, enabled=True):
        self.enabled = enabled

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False
