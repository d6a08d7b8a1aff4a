"""Functions that keep the tensors they made for the next call, and a way to have all of them forget."""

import functools

_ALL: list = []


def remembered(function):
    """`function`, with the results of its last 256 different calls kept: layers of a model are few different shapes."""
    kept = functools.lru_cache(maxsize=256)(function)
    _ALL.append(kept)
    return kept


def forget():
    """Drop all that is kept: tensors that were made where they have no values must not serve where they need some."""
    for kept in _ALL:
        kept.cache_clear()
