"""Something before and after each forward of a model, for code that calls the model itself, as generate does."""

import contextlib
import threading


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
