"""The arguments of a forward, and something before and after each, for code that calls the model itself (generate)."""

import contextlib
import inspect
import threading

_PARAMETERS: dict = {}  # no functools.cache: torch.compile would warn of it


def parameters_of(cls):
    """The parameters of a model class' forward, by name."""
    if cls not in _PARAMETERS:
        _PARAMETERS[cls] = dict(list(inspect.signature(cls.forward).parameters.items())[1:])
    return _PARAMETERS[cls]


def by_name(model, args, kwargs):
    """The arguments of a forward of `model`, {name: value}."""
    return {**dict(zip(parameters_of(type(model)), args)), **kwargs}


@contextlib.contextmanager
def around_forwards(model, before, after=None):
    """While inside, each forward of `model` in this thread begins with before(args, kwargs), ends with after(out)."""
    me = threading.get_ident()

    def begin(module, args, kwargs):
        if threading.get_ident() == me:
            before(args, kwargs)

    def end(module, args, out):
        if threading.get_ident() == me:
            after(out)

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    if after is not None:
        hooks.append(model.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
