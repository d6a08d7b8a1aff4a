"""The classes of a method that has no more to say than its adapter and its default targets."""

from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner


def layer_class(name, adapter_cls, base=AdapterLayer):
    """The wrapper of a base layer, called `name` in the method's file, for isinstance, repr and pickle."""
    about = {"__doc__": f"A base layer with {adapter_cls.__name__} adapters.", "__module__": adapter_cls.__module__}
    return type(name, (base,), {"adapter_cls": adapter_cls, **about})


def tuner_class(name, layer_cls, targets):
    """The class of a model, called `name` in the method's file. targets: {model_type: names of modules}."""
    about = {"__doc__": f"A model with {layer_cls.adapter_cls.__name__} adapters.", "__module__": layer_cls.__module__}
    return type(name, (Tuner,), {"layer_cls": layer_cls, "target_module_mapping": targets, **about})
