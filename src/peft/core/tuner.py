"""Model level: give a model's layers their adapters, switch them, merge them, take them away, for every method."""

import contextlib
import warnings

from torch import nn

from peft import quant
from peft.core import biases, extras, match, shared
from peft.core.compose import ByRow, Composition
from peft.core.layer import AdapterLayer
from peft.core.slots import wrappers_in
from peft.core.state import AdapterState
from peft.errors import AdapterError, ConfigError, MergeError, NoMatchingPeftModuleError
from peft.ops import onednn


class Tuner(nn.Module):
    """A base model whose targeted layers carry adapters of one method.

    layers  {path: AdapterLayer}, built once at injection: everything below walks it, never the module tree
    extras  {path: AuxiliaryTrainingWrapper}, modules trained whole or by row beside the adapters
    state   the active record that all of them read
    shared  {field: container} of tensors that the layers of an adapter share
    """

    layer_cls: type[AdapterLayer]
    target_module_mapping: dict = {}  # model_type -> default targets
    unsafe_targets: tuple[str, ...] = ()  # last names that state-space models cannot have adapted
    injectable = True  # False: the adapted model does nothing, or something else, without its tuner
    condenses = True  # a long list of explicit targets becomes a short one of name endings

    def __init__(
        self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None, autocast_adapter_dtype=True
    ):
        super().__init__()
        self.model = model
        self.peft_config = {}
        self.layers, self.extras = {}, {}
        self._collect()
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        known = next(iter([*self.layers.values(), *self.extras.values()]), None)
        self.state = AdapterState() if known is None else getattr(known.state, "origin", known.state)
        same = (layer for layer in self.layers.values() if isinstance(layer, self.layer_cls))
        self.shared = next((layer.shared for layer in same), {})
        trained = []
        if known is None:
            trained = [p for p in model.parameters() if p.requires_grad]
            onednn.attach(model)  # now, before adapters make it a tree of many more modules
        for p in trained:
            p.requires_grad = False
        if hasattr(model, "peft_config") and known is not None:
            self.peft_config.update(model.peft_config if isinstance(model.peft_config, dict) else {})
        try:
            for name, config in configs.items():
                self.inject_adapter(
                    model,
                    name,
                    config,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
        except BaseException:
            for p in trained:
                p.requires_grad = True
            if known is None:
                onednn.detach(model)
            raise
        self.set_adapter([adapter_name])
        quant.attach(model)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "layer_cls" in cls.__dict__:
            cls.tuner_layer_cls, cls.prefix = cls.layer_cls, cls.layer_cls.adapter_cls.prefix

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def call_arguments(self, args, kwargs):
        """What adapters need of a call, as a dict; taken out of kwargs where the base model does not know it."""
        return {}

    def during_generate(self, arguments):
        """A context for a generate, in which what `call_arguments` gave follows the forwards that it consists of."""
        return contextlib.nullcontext()

    def own_slots(self, adapter_name):
        """The slots of what a file holds of an adapter beside its layers; keys and file keys are relative to this."""
        return shared.slots(self, adapter_name)

    def file_path(self, path):
        """The path of an adapted layer as the keys of a file have it."""
        return path

    # -- injection -----------------------------------------------------------------------------------------------
    def inject_adapter(
        self, model, adapter_name, config=None, *, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ):
        """Add one adapter to all layers that its config targets; nothing of it stays behind if that fails.

        low_cpu_mem_usage: adapter tensors on the meta device, for a loader that assigns them.
        state_dict: take the targets from its keys instead of the config.
        """
        config = self.peft_config[adapter_name] if config is None else config
        check_name(adapter_name)
        before = dict(self.peft_config)
        self.peft_config[adapter_name] = config
        try:
            self.prepare_config(config)
            self.check_new_config(adapter_name, config)
            self.prepare_model(config)
            how = {"autocast": autocast_adapter_dtype, "empty": low_cpu_mem_usage}
            self._add_to_targets(adapter_name, config, state_dict, how)
            if extras.only_extras(config):
                extras.add(self, adapter_name, config, how)
                self._stale = True
            extras.tie_adapters(self, adapter_name, config, how)
            if self._stale:
                self._collect()
            biases.train(self)
        except BaseException:
            self._collect()
            self._remove(adapter_name)
            self.peft_config.clear()
            self.peft_config.update(before)
            raise
        model.peft_config = self.peft_config

    def prepare_config(self, config):
        """Fill in targets that the config leaves open."""
        targets = config.target_modules
        if targets is None and not getattr(config, "target_parameters", None):
            model_type = getattr(getattr(self.model, "config", None), "model_type", "custom")
            if model_type not in self.target_module_mapping:
                raise ConfigError(
                    f"Please specify `target_modules` in `peft_config`: there is no default for models of the type "
                    f"{model_type!r}. 'all-linear' adapts every linear layer."
                )
            targets = self.target_module_mapping[model_type]
            config.target_modules = targets if isinstance(targets, str) else set(targets)
        elif isinstance(targets, str) and targets.lower() == match.ALL_LINEAR:
            config.target_modules = match.all_linear(self.model, config.task_type)

    def check_new_config(self, adapter_name, config):
        """Raise ConfigError where a new adapter cannot share the model with those already there."""
        biases.check(self.peft_config)

    def configs_like(self, config):
        """The configs of all adapters of this method, also where others share the model."""
        return [c for c in self.peft_config.values() if type(c) is type(config)]

    def prepare_model(self, config):
        """Change the model's structure before any layer is looked at."""

    def _add_to_targets(self, name, config, state_dict, how):
        state_space = getattr(getattr(self.model, "config", None), "model_type", "") in match.STATE_SPACE_TYPES
        unsafe = self.unsafe_targets if state_space else ()
        parameters = getattr(config, "target_parameters", None) or ()
        found, wanted, excluded = [], match.Names(None), match.Names(None)
        if config.target_modules:
            try:
                found, wanted, excluded = match.target_modules(self.model, config, unsafe)
            except NoMatchingPeftModuleError:
                if not parameters and not state_dict:
                    raise
        if state_dict:
            found = match.targets_of_file(self.model, self.layer_cls.adapter_cls.prefix, state_dict, found)
        in_parameters, wanted_parameters = [], match.Names(None)
        if parameters:
            in_parameters, wanted_parameters = match.target_parameters(self.model, parameters)
        if self.layer_cls.adapter_cls.shared_fields:
            shared.make(self, name, config, {key: self._layer_at(path, m) for key, path, m in found}, how["autocast"])
        for key, path, module in found:
            self._layer_at(path, module).add_adapter(name, config, key, **how)
        for key, path, parameter in in_parameters:
            self._layer_at(path, self.model.get_submodule(path), parameter).add_adapter(name, config, key, **how)
        may_be_none = config.target_modules == match.DUMMY_TARGET_MODULES or extras.only_extras(config)
        if not found and not in_parameters and not may_be_none:
            raise NoMatchingPeftModuleError(
                f"No modules were targeted for adaptation: target_modules={config.target_modules!r}, "
                f"target_parameters={list(parameters)!r}. Name at least one layer of the model."
            )
        match.warn_unused(self.model, wanted if found else match.Names(None), excluded, wanted_parameters)
        names = config.target_modules
        if self.condenses and isinstance(names, set) and len(names) >= match.CONDENSE_FROM and not state_dict:
            keys = {k for k, _, _ in found}
            config.target_modules = match.minimal_endings(
                [k for k, _, _ in found], {k for k, _, _ in match.walk(self.model)} - keys
            )

    def _layer_at(self, path, module, parameter=None):
        """This method's wrapper at a path: the one already there, else a new one around what is there."""
        layer = module
        while isinstance(layer, AdapterLayer):
            same = isinstance(layer, self.layer_cls)
            if same and (parameter is None or layer.kind.param == parameter) == (
                layer.kind.name != "param" or bool(parameter)
            ):
                return layer
            layer = layer.base_layer
        new = self.layer_cls(module, param=parameter, state=self.state)
        new.shared = self.shared
        match.put(self.model, path, new)
        self._stale = True
        return new

    def _collect(self):
        """Rebuild the registry from the module tree. New dicts: other threads may be reading the old."""
        self._stale = False
        self.layers, self.extras = wrappers_in(self.model)

    # -- activation ----------------------------------------------------------------------------------------------
    @property
    def active_adapters(self):
        return list(self.state.active)

    @property
    def active_adapter(self):
        return self.active_adapters

    def holders(self):
        """Everything that holds something for adapters."""
        return [*self.layers.values(), *self.extras.values()]

    def set_adapter(self, adapter_name, inference_mode=False):
        """Let these adapters act, and no others. They are trained unless made for inference; others are not.

        adapter_name: one name, several, which then act one after the other, or a Composition of names. Costs nothing
        per layer for adapters that are not trained. While merged: unmerges, with a warning.
        """
        block = adapter_name if isinstance(adapter_name, Composition) else None
        names = (adapter_name,) if isinstance(adapter_name, str) else block.names if block else tuple(adapter_name)
        if block is not None:
            block.check(self.layers)
        for wrapper in self.extras.values() if not isinstance(block, ByRow) else ():
            wrapper.check_can_activate(names)
        merged = [layer for layer in self.layers.values() if layer.merged]
        if merged:
            warnings.warn("Some adapters are merged; they are unmerged before others are activated.", stacklevel=2)
            for layer in merged:
                layer.unmerge()
        before, self.state.active, self.state.block = self.state.active, names, block
        changed = {n for n in {*before, *names} if n in self.peft_config}
        for layer in self.layers.values():
            for name in changed:
                adapter = layer.adapters.get(name)
                if adapter is not None and (adapter.trainable or not adapter.frozen):
                    adapter.set_trainable(name in names and not inference_mode and not adapter.frozen)
        for wrapper in self.extras.values():
            wrapper.mark_trainable(names, inference_mode)
        self._rejoin()
        biases.train(self)

    def _rejoin(self):
        for holder in self.state.strays:
            holder.state = self.state
        self.state.strays.clear()

    def enable_adapter_layers(self):
        """Let the active adapters act."""
        self._enable(True)

    def disable_adapter_layers(self):
        """Compute what the base model would, until enabled again. Nothing about training changes."""
        for name in biases.trainers(self):
            warnings.warn(
                "Careful, disabling adapter layers does not bring the base model's outputs back: "
                f"the adapter {name!r} also trained its biases.",
                stacklevel=3,
            )
        self._enable(False)

    def _enable(self, enabled):
        self.state.enabled = enabled
        for holder in self.state.strays:
            holder.state.enabled = enabled

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Train adapters, or freeze them, active or not."""
        for holder in self.holders():
            holder.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name):
        """Remove an adapter. If it was active, the first remaining one becomes active. Unknown: ValueError."""
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist; there are {list(self.peft_config)}.")
        if self.state.block is not None and adapter_name in self.state.block.names:
            raise AdapterError(f"Adapter {adapter_name!r} is part of {self.state.block!r}; activate others first.")
        self._remove(adapter_name)
        del self.peft_config[adapter_name]

    def _remove(self, name):
        for holder in self.holders():
            holder.delete_adapter(name)
        shared.drop(self, name)
        self.unwrap_empty()
        for path, wrapper in list(self.extras.items()):
            if not list(wrapper.adapter_names):
                match.put(self.model, path, wrapper.original_module)
        self._collect()
        if name in self.state.active:
            left = tuple(n for n in self.state.active if n != name)
            if not left and (rest := [n for n in self.peft_config if n != name]):
                warnings.warn(
                    f"Adapter {name} was active, which is now deleted. Setting active adapter to {rest[0]}.",
                    stacklevel=4,
                )
                left = (rest[0],)
            self.set_adapter(left)

    def adapters_called(self, name):
        """The adapters of that name on all layers."""
        return [layer.adapters[name] for layer in self.layers.values() if name in layer.adapters]

    def file_form(self, name, tensors, config, plain=False):
        """(tensors, config) of an adapter as a file holds them. plain: in the simplest form of the method."""
        return tensors, config

    def unwrap_empty(self):
        """Take away the wrappers that hold no adapter any more."""
        for path, layer in sorted(self.layers.items(), key=lambda item: -len(item[0])):
            if not layer.adapters:
                self._unwrap(path, layer)
        self._collect()

    # -- merge ---------------------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names=None, safe_merge=False):
        """Put adapters (default: the active ones) into the base weights; `unmerge_adapter` undoes it bit for bit.

        Costs a copy of each merged weight while merged. Raises MergeError where the result would not be finite;
        whatever was merged by this call is then undone.
        """
        self.check_mergeable(adapter_names)
        done = []
        try:
            for layer in self._innermost_first():
                done.append((layer, len(layer.merged_adapters)))
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            for layer, before in reversed(done):
                if len(layer.merged_adapters) > before:
                    layer.unmerge(keep=before)
            raise

    def check_mergeable(self, adapter_names):
        """Raise where these are no names of adapters, or None while adapters act in a composition."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names, got the str {adapter_names!r}.")
        if self.state.block is not None and adapter_names is None:
            raise MergeError(
                f"What {self.state.block!r} does is not put into the weights. Name adapters in adapter_names to merge "
                "one after the other, or make one of them first with add_weighted_adapter."
            )
        if unknown := [n for n in adapter_names or () if n not in self.peft_config]:
            raise AdapterError(f"Cannot merge unknown adapters {unknown}; there are {list(self.peft_config)}.")

    def _innermost_first(self):
        """An outer wrapper acts on what the inner one made."""
        tokens = [w.token_adapter for w in self.extras.values() if hasattr(type(w), "merge")]
        ordered = sorted(self.layers.items(), key=lambda item: -item[0].count("base_layer"))
        return [layer for _, layer in ordered] + tokens

    def unmerge_adapter(self):
        """Put back what merging replaced."""
        for layer in reversed(self._innermost_first()):
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None, **how):
        """The base model with the adapters in its weights; this object is used up.

        how: target, verify and others, for quantized bases and for proof: see `core.merging.merge_and_unload`.
        """
        from peft.core import merging

        return merging.merge_and_unload(self, safe_merge, adapter_names, **how)

    def unload(self):
        """The base model as it was before any adapter."""
        self.unmerge_adapter()
        return self.dismantle(lambda wrapper: wrapper.original_module)

    def dismantle(self, choose):
        """The base model without any wrapper; `choose` says what stays of a module that is trained whole."""
        for path, layer in sorted(self.layers.items(), key=lambda item: -len(item[0])):
            self._unwrap(path, layer)
        for path, wrapper in self.extras.items():
            match.put(self.model, path, choose(wrapper))
        self.layers.clear()
        self.extras.clear()
        extras.fix_tie_flag(self.model)
        quant.detach(self.model)
        onednn.detach(self.model)
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        return self.model

    def _unwrap(self, path, layer):
        if layer.kind.name == "mha":
            layer.kind.detach(layer)
        elif layer.owned:
            return  # goes with the attention module that reads its weight
        match.put(self.model, path, layer.base_layer)

    def supports_lora_conversion(self, adapter_name="default"):
        return all(layer.supports_lora_conversion(adapter_name) for layer in self.layers.values())


def check_name(name):
    """Adapter names are one part of a dotted key and a folder name, so some are refused."""
    if not isinstance(name, str) or not name or set(name) & set("./\\\0") or name in ("..",):
        raise KeyError(f"An adapter name must be a non-empty str without '.', '/' and '\\', got {name!r}.")
