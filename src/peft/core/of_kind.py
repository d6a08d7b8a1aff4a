"""Classes that stand for the layers of one method on one kind of base layer."""

import dataclasses

from peft.core.state import AdapterState


class OfKind(type):
    """The type of classes like upstream's `lora.Linear`: their instances are a method's layers on one kind of base.

    Such a class is not in any layer's bases: isinstance asks the layer for its kind, and calling the class makes a
    layer with one active adapter. Classes derived from it are ordinary ones that start the same way.
    """

    def __new__(meta, name, bases, namespace, rule=None, config=None):
        """rule: (name of the kind, spatial dimensions or None, name of the backend)."""
        if rule is not None:
            namespace = {**namespace, "rule": rule, "config_cls": config, "__init__": _start}
        return super().__new__(meta, name, bases, namespace)

    def __init__(cls, name, bases, namespace, **_):
        super().__init__(name, bases, namespace)

    def __instancecheck__(cls, layer):
        if "rule" not in cls.__dict__:
            return super().__instancecheck__(layer)
        kind, spatial, backend = cls.rule
        return (
            isinstance(layer, cls.__base__)
            and layer.kind.name == kind
            and layer.backend.name == backend
            and (spatial is None or layer.kind.spatial == spatial)
        )

    def __call__(cls, *args, **settings):
        if "rule" not in cls.__dict__:
            return super().__call__(*args, **settings)
        layer = cls.__base__.__new__(cls.__base__)
        _start(layer, *args, origin=cls, **settings)
        if not isinstance(layer, cls):
            raise TypeError(f"{cls.__name__} cannot adapt a {type(layer.get_base_layer()).__name__}.")
        return layer


def _start(layer, base_layer, adapter_name, config=None, *, parameter_name=None, origin=None, **settings):
    """Initialise a layer and give it adapter `adapter_name`. Settings that are fields of the config replace its own."""
    origin = origin or next(c for c in type(layer).__mro__ if "rule" in c.__dict__)
    origin.__base__.__init__(layer, base_layer, param=parameter_name, state=AdapterState([adapter_name]))
    fields = {f.name for f in dataclasses.fields(origin.config_cls)}
    changes = {k: v for k, v in settings.items() if k in fields}
    layer.add_adapter(adapter_name, dataclasses.replace(config or origin.config_cls(), **changes))
