"""Modules that are trained beside the adapters: whole copies (modules_to_save) and single embedding rows."""

import copy

import torch
from torch import nn

from peft.core.fields import module_slots
from peft.core.state import AdapterState, Switchable
from peft.errors import AdapterError


class AuxiliaryTrainingWrapper(Switchable, nn.Module):
    """A module of the model that adapters may replace. Follows the same active record as the adapted layers."""

    def __init__(self, module, state=None):
        super().__init__()
        self.state = AdapterState() if state is None else state
        self.original_module = module
        self.frozen = set()  # adapters that activating does not make trainable

    # -- what a kind of wrapper defines --------------------------------------------------------------------------
    @property
    def adapter_names(self):
        """Names of the adapters that this wrapper holds something for."""
        raise NotImplementedError

    def trained(self, name):
        """The trained parameters of one adapter."""
        raise NotImplementedError

    def saved_slots(self, name):
        """The slots of one adapter, keys relative to this module."""
        raise NotImplementedError

    # -- activation ----------------------------------------------------------------------------------------------
    @property
    def current(self):
        """The active adapter that this wrapper holds, or None."""
        if not self.state.enabled:
            return None
        return next((n for n in self.state.active if n in self.adapter_names), None)

    @property
    def active_adapters(self):
        return [n for n in self.state.active if n in self.adapter_names]

    active_adapter = active_adapters

    def check_can_activate(self, names):
        """Raise where more than one of these adapters would replace this module."""

    def set_adapter(self, adapter_names, inference_mode=False):
        """Switch this module alone."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.check_can_activate(names)
        self.mark_trainable(names, inference_mode)
        self._stray(names, self.state.enabled)

    def mark_trainable(self, names, inference_mode=False):
        for name in self.adapter_names:
            for p in self.trained(name):
                p.requires_grad = name in names and not inference_mode and name not in self.frozen

    def set_requires_grad(self, adapter_names, requires_grad=True):
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapter_names:
                (self.frozen.discard if requires_grad else self.frozen.add)(name)
                for p in self.trained(name):
                    p.requires_grad = requires_grad

    # -- transformers' loader asks for these -----------------------------------------------------------------------
    def adapter_state_dict(self, adapter_name, state_dict=None):
        """The tensors of one adapter under their names in a file, relative to this module."""
        if adapter_name not in self.adapter_names:
            return {}
        slots = self.saved_slots(adapter_name)
        return {s.file_key: s.tensor if state_dict is None else state_dict[s.key] for s in slots}

    def adapter_state_dict_load_map(self, adapter_name):
        """{key in a file: key in the model}, both relative to this module."""
        if adapter_name not in self.adapter_names:
            return {}
        return {s.file_key: s.key for s in self.saved_slots(adapter_name)}


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """`modules_to_save`: each adapter has its own trained copy of the module."""

    def __init__(self, module, adapter_name=None, state=None):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise TypeError(f"modules_to_save cannot be applied to modules of type {type(module)}; name its members.")
        super().__init__(module, state)
        self.modules_to_save = nn.ModuleDict()
        if adapter_name is not None:
            self.update(adapter_name)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "modules_to_save" not in self._modules:
                raise
            return getattr(self.current_module, name)

    @property
    def adapter_names(self):
        return self._modules["modules_to_save"]._modules.keys()

    def update(self, adapter_name, empty=False, **_):
        """Make a copy for an adapter. float16 copies become float32: float16 cannot be trained.

        empty: allocate on the meta device, for a loader that assigns the tensors.
        """
        if adapter_name in self.adapter_names:
            return
        new = on_meta(self.original_module) if empty else copy.deepcopy(self.original_module)
        for p in new.parameters():
            if p.dtype is torch.float16:
                p.data = p.data.float()
        new.requires_grad_(adapter_name in self.state.active)
        self.modules_to_save[adapter_name] = new

    def settle(self, adapter_name):
        """Give what a file left out of a copy the values of the original."""
        original = dict(self.original_module.state_dict(keep_vars=True))
        for slot in module_slots(self.modules_to_save[adapter_name]):
            if slot.tensor.is_meta:
                slot.replace(original[slot.key].detach().to(slot.tensor.dtype).clone())

    def delete_adapter(self, adapter_name, new_active_adapters=None):
        if adapter_name in self.adapter_names:
            del self.modules_to_save[adapter_name]

    def check_can_activate(self, names):
        held = [n for n in names if n in self.adapter_names]
        if len(held) > 1:
            raise AdapterError(
                f"modules_to_save allows one active adapter, but {held} all have their own copy of a "
                f"{type(self.original_module).__name__}. Activate one of them."
            )

    def trained(self, name):
        return self.modules_to_save[name].parameters()

    def saved_slots(self, name):
        slots = module_slots(self.modules_to_save[name])
        for slot in slots:
            slot.file_key, slot.key = slot.key, f"modules_to_save.{name}.{slot.key}"
        return slots

    @property
    def current_module(self):
        """The module that acts now."""
        name = self.current
        return self.original_module if name is None else self.modules_to_save[name]

    def forward(self, x, *args, **kwargs):
        call = self.state.call() if self.state.calls and self.state.enabled else None
        if call is not None and call.names is not None:
            return self._forward_call(call, x, *args, **kwargs)
        return _run(self.current_module, self.original_module, x, *args, **kwargs)

    def _forward_call(self, call, x, *args, **kwargs):
        plan = call.rows(x.shape[0], tuple(self.adapter_names), x.device)
        if isinstance(plan, str):
            return _run(self.modules_to_save[plan], self.original_module, x, *args, **kwargs)
        if plan.rows and not isinstance(
            self.original_module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        ):
            raise TypeError(f"Mixed batching is not supported for {type(self.original_module)}")
        y = self.original_module(x, *args, **kwargs)
        y = y.clone() if plan.rows else y
        for name, rows in plan.rows.items():
            y[rows] = _run(self.modules_to_save[name], self.original_module, x[rows], *args, **kwargs).to(y.dtype)
        return y


def on_meta(module):
    """A copy of a module whose tensors are on the meta device, but for those that no file holds."""
    memo = {}
    for slot in module_slots(module):
        t, fake = slot.tensor, torch.empty_like(slot.tensor, device="meta")
        memo[id(t)] = nn.Parameter(fake, requires_grad=False) if isinstance(t, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def _run(module, original, x, *args, **kwargs):
    """Call a copy; a float32 copy of a float16 module casts on the way in and out."""
    p = next(module.parameters(), None)
    if p is not None and p.dtype is torch.float32 and x.dtype is torch.float16:
        y = module(x.float(), *args, **kwargs)
        return y.half() if isinstance(y, torch.Tensor) else y
    return module(x, *args, **kwargs)


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """`trainable_token_indices`: rows of an embedding, or of the head tied to it, are trained beside the adapter."""

    def __init__(self, module, layer_cls, state=None):
        super().__init__(None, state)
        self.token_adapter = layer_cls(module, state=self.state)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "token_adapter" not in self._modules:
                raise
            return getattr(self._modules["token_adapter"], name)

    @property
    def original_module(self):
        return self._modules["token_adapter"].get_base_layer()

    @original_module.setter
    def original_module(self, value):
        assert value is None, "the original module is the token adapter's base layer"

    @property
    def adapter_names(self):
        return self.token_adapter.adapters.keys()

    def update(self, adapter_name, config=None, **how):
        self.token_adapter.add_adapter(adapter_name, config, **how)

    def delete_adapter(self, adapter_name, new_active_adapters=None):
        self.token_adapter.delete_adapter(adapter_name)

    def trained(self, name):
        return self.token_adapter.adapters[name].parameters()

    def set_adapter(self, adapter_names, inference_mode=False):
        super().set_adapter(adapter_names, inference_mode)
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled):
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def saved_slots(self, name):
        adapter = self.token_adapter.adapters[name]
        slots = adapter.saved_slots()
        for slot in slots:
            slot.file_key = f"token_adapter.{adapter.file_key(slot.key, adapter.name)}"
            slot.key = f"token_adapter.{slot.key}"
        return slots

    def merge(self, safe_merge=False, adapter_names=None):
        self.token_adapter.merge(safe_merge, adapter_names)

    def unmerge(self):
        self.token_adapter.unmerge()

    def forward(self, x, *args, **kwargs):
        return self.token_adapter(x, *args, **kwargs)
