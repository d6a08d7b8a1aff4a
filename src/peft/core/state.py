"""What all adapted layers of one model read on each forward: which adapters act, and what this call asks for."""

import contextlib
import threading

import torch


class AdapterState:
    """The one active record of a model. Switching or disabling adapters changes it; no layer is visited.

    active    names of the adapters that act, in order; a new tuple object at each change
    enabled   False: all layers compute what the base model would
    block     None; or the Composition that says how they act together, where that is not one after the other
    calls     {thread id: Call}, the arguments of forwards now running that choose adapters for themselves; under None
              the last such call, for checkpointing that recomputes it after its forward has ended
    handed    {(thread id, name): tensor} that one layer of a forward hands to a later one
    """

    def __init__(self, active=(), enabled=True):
        self.active = tuple(active)
        self.enabled = enabled
        self.block = None
        self.calls = {}
        self.handed = {}
        self.strays = []  # layers that were switched one by one and so left this record

    def call(self):
        """The arguments of the forward that this thread is in, or None."""
        return self.calls.get(_this_thread()) or self.calls.get(None)

    def hand(self, name, tensor):
        """Put a tensor aside for a later layer of this forward."""
        self.handed[_this_thread(), name] = tensor

    def take(self, name):
        """What was put aside under the name; None where nothing was. It is given once."""
        return self.handed.pop((_this_thread(), name), None)

    def forget_replay(self):
        """A forward that chooses nothing begins: no earlier call is to be recomputed."""
        self.calls.pop(None, None)

    @contextlib.contextmanager
    def during(self, call, replay=False):
        """While inside, forwards of this thread are governed by `call`; other threads are not affected."""
        me = _this_thread()
        before = self.calls.get(me)
        self.calls[me] = call
        if replay:
            self.calls[None] = call
        else:
            self.forget_replay()
        try:
            yield
        finally:
            if before is None:
                self.calls.pop(me, None)
            else:
                self.calls[me] = before

    def __getstate__(self):
        return {**self.__dict__, "calls": {}, "handed": {}}


def _this_thread():
    """A thread's key. torch.compile, which cannot trace get_ident, reads what it has put under the other key itself."""
    return "compiling" if torch.compiler.is_compiling() else threading.get_ident()


class Stray(AdapterState):
    """The record of a layer that was switched on its own; calls still reach it through the model's record."""

    def __init__(self, origin, active, enabled):
        super().__init__(active, enabled)
        self.origin = origin
        self.calls, self.handed = origin.calls, origin.handed

    def call(self):
        return self.origin.call()

    def __getstate__(self):
        return {**super().__getstate__(), "calls": None, "handed": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.calls, self.handed = self.origin.calls, self.origin.handed


class Switchable:
    """A part of a model that follows an active record, `self.state`, until it is switched on its own."""

    state: AdapterState

    @property
    def disable_adapters(self):
        return not self.state.enabled

    def enable_adapters(self, enabled):
        """Let the adapters of this part act, or not; nothing about their training changes."""
        self._stray(self.state.active, enabled)

    def _stray(self, active, enabled):
        if isinstance(self.state, Stray):
            self.state.active, self.state.enabled = active, enabled
        elif (active, enabled) != (self.state.active, self.state.enabled):
            self.state.strays.append(self)
            self.state = Stray(self.state, active, enabled)


class Call:
    """The arguments of one forward that reach adapted layers without touching the model's signature.

    adapter_names: one adapter name a sample of the batch; "__base__" means no adapter; None: the active adapters act.
    arguments: what else adapters read of this call, for example task_ids.
    part: (row indices, number of rows) while an adapter computes some rows of a layer's input; else None.
    """

    BASE = "__base__"

    def __init__(self, adapter_names=None, **arguments):
        self.names = None if adapter_names is None else list(adapter_names)
        self.arguments = arguments
        self.part = None
        self._plans = {}

    def rows(self, size, present, device):
        """`[(name, row indices)]` of the adapters in `present` for a layer input of `size` rows, or one name for all.

        A row of the batch may be many rows here (beams, or tokens of flattened sequences): size must be a multiple
        of the number of names. Computed once per forward and kind of layer, not per layer.
        """
        key = (size, present, device)
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = self._plan(size, present, device)
        return plan

    def _plan(self, size, present, device):
        from peft.errors import AdapterError

        if size % len(self.names):
            raise AdapterError(
                f"adapter_names has {len(self.names)} names, but a layer got {size} rows: one name a sample is needed."
            )
        times = size // len(self.names)
        groups = {}
        for i, name in enumerate(self.names):
            if name in present:
                groups.setdefault(name, []).extend(range(i * times, (i + 1) * times))
        if len(groups) == 1 and len(next(iter(groups.values()))) == size:
            return next(iter(groups))
        return MixedPlan(groups, device)


class MixedPlan:
    """Rows of one batch by adapter, `rows` {name: row indices}, and what batched products need of it."""

    def __init__(self, groups, device):
        self.groups, self.device = groups, device
        self.rows = {n: torch.tensor(rows, device=device) for n, rows in groups.items()}
        self.names = tuple(groups)
        self._layouts = {}

    def layout(self, names, size):
        """The Layout of a product over `names`, which hold all of the plan's adapters, for an input of `size` rows."""
        if (layout := self._layouts.get((names, size))) is None:
            layout = self._layouts[names, size] = Layout(self.groups, names, size, self.device)
        return layout


class Layout:
    """Where the rows of a batch stand in a batched product (adapters, rows of the adapter that has most, ...).

    index     rows of the input in the order of the product, short groups padded by repeating a row; None: as they are
    places    for each row with an adapter, its place among the product's rows
    rows      those rows of the input; None: all, in order
    """

    def __init__(self, groups, names, size, device):
        longest = max(map(len, groups.values()))
        index, place_of = [], {}
        for slot, name in enumerate(names):
            own = groups.get(name, [])
            place_of.update((row, slot * longest + i) for i, row in enumerate(own))
            index += own + [own[0] if own else 0] * (longest - len(own))
        rows = sorted(place_of)
        in_order = index == list(range(size)) and len(rows) == size  # a row without an adapter may stand for padding
        self.index = None if in_order else torch.tensor(index, device=device)
        self.places = torch.tensor([place_of[row] for row in rows], device=device)
        self.rows = None if len(rows) == size else torch.tensor(rows, device=device)
