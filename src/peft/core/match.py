"""Which modules and parameters of a model a config targets."""

import re
import warnings

from torch import nn

from peft import quant
from peft.core.defaults import BLOCK_LISTS
from peft.core.layer import AdapterLayer
from peft.core.wrappers import AuxiliaryTrainingWrapper
from peft.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, nearest

ALL_LINEAR = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"  # matches nothing, and may
HEAD_NAMES = ("score", "classifier")  # of sequence classifiers
CONDENSE_FROM = 20  # a list of this many explicit names is condensed to name endings
STATE_SPACE_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba")
STATE_SPACE_UNSAFE = ("out_proj", "conv1d")  # their kernels read these weights directly


def walk(model):
    """(key, path, module) of each module that could be adapted. key: the name in the unwrapped model.

    Adapters' own parts are not visited; below a wrapper come the children of its base layer, whose path says so.
    """
    stack = [("", "", model)]
    while stack:
        key, path, module = stack.pop()
        if key:
            yield key, path, module
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue
        while isinstance(module, AdapterLayer):
            module, path = module._modules["base_layer"], f"{path}.base_layer"
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((f"{key}.{name}" if key else name, f"{path}.{name}" if path else name, child))


def block_lists(model):
    """[(key, list)] of a model's lists of blocks, without lists that lie within a block."""
    found = []
    for key, _, module in walk(model):
        named = isinstance(module, nn.ModuleList) and key.rpartition(".")[2] in BLOCK_LISTS
        if named and len(module) and not any(key.startswith(f"{outer}.") for outer, _ in found):
            found.append((key, module))
    return found


class Names:
    """A config's list of names (each matches a whole name or its ending at a dot) or one regex for the whole name."""

    def __init__(self, spec):
        self.spec = spec
        self.regex = _compiled(spec) if isinstance(spec, str) else None
        self.names = frozenset() if spec is None or self.regex else frozenset(spec)
        self.depths = sorted({n.count(".") + 1 for n in self.names})
        self.used = set()

    def __bool__(self):
        return bool(self.regex or self.names)

    def match(self, key):
        """The list entry (or the regex) that matches `key`, or None."""
        if self.regex is not None:
            return self.spec if self.regex.fullmatch(key) else None
        if key in self.names:
            return key
        parts = key.split(".")
        for depth in self.depths:
            ending = ".".join(parts[-depth:])
            if len(parts) > depth and ending in self.names:
                return ending
        return None

    def take(self, key):
        """Like match, and remembers that the entry was of use."""
        entry = self.match(key)
        if entry is not None:
            self.used.add(entry)
        return entry

    def unused(self):
        return [] if self.regex else sorted(self.names - self.used)


def _compiled(pattern, shown=None):
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{shown or pattern!r} is not a valid regular expression: {error}.") from error


def layer_index(key, pattern=None):
    """The index of the layer that `key` lies in: the number after the list's name; None where there is none."""
    for name in [pattern] if isinstance(pattern, str) else list(pattern or []) or [r"[^.]+"]:
        if found := _compiled(rf"(?:.*\.)?{name}\.(\d+)\.", name).match(key):
            return int(found.group(1))
    return None


def target_modules(model, config, unsafe=()):
    """[(key, path, module)] that config.target_modules selects. Raises NoMatchingPeftModuleError where none do.

    Layers are chosen by layers_to_transform only where a name's ending matched, as exact names need no choosing.
    unsafe: last names that the base model cannot have adapted; targeting one is a ValueError.
    """
    modules = list(walk(model))
    wanted, excluded = Names(config.target_modules), Names(config.exclude_modules)
    saved = tuple(config.modules_to_save or ())
    picked = config.layers_to_transform
    picked = {picked} if isinstance(picked, int) else set(picked or ())
    found, dropped = [], 0
    for key, path, module in modules:
        entry = wanted.match(key)
        if entry is None:
            continue
        if (excluded and excluded.take(key)) or isinstance(module, AuxiliaryTrainingWrapper):
            dropped += 1
            continue
        if saved and any(k.endswith(saved) for k in _ancestors(key)):
            dropped += 1
            continue
        if picked and entry != key and layer_index(key, config.layers_pattern) not in picked:
            continue
        if key.rpartition(".")[2] in unsafe:
            raise ConfigError(f"[peft] Module {key!r} is incompatible with Mamba-based models: its kernels bypass it.")
        wanted.used.add(entry)
        found.append((key, path, module))
    if not found and wanted and config.target_modules != DUMMY_TARGET_MODULES:
        _raise_no_match(config, modules, dropped, picked)
    return found, wanted, excluded


def _ancestors(key):
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _raise_no_match(config, modules, dropped, picked):
    asked = config.target_modules
    asked = asked if isinstance(asked, str) else sorted(asked)
    if dropped:
        why = "All modules were excluded. This is likely unintended; check exclude_modules and modules_to_save."
    elif picked:
        why = (
            f"No modules were targeted for adaptation in the layers {sorted(picked)} "
            f"(layers_pattern={config.layers_pattern!r}). Do the layers have these indices?"
        )
    else:
        endings = {key.rpartition(".")[2] for key, _, m in modules if not list(m.children())}
        hint = asked if isinstance(asked, str) else next(iter(asked), "")
        why = f"Please check the target modules and try again. Nearest names: {nearest(hint, endings)}."
    raise NoMatchingPeftModuleError(f"Target modules {asked} not found in the base model. {why}")


def target_parameters(model, names):
    """[(key, path of the module, parameter name)] for config.target_parameters.

    Two parameters of one module nest two wrappers; the order in which the module registers them fixes the file's keys.
    """
    wanted, found = Names(list(names)), []
    for key, path, module in [("", "", model), *walk(model)]:
        while isinstance(module, AdapterLayer):
            module = module._modules["base_layer"]
        for name in module._parameters:
            full = f"{key}.{name}" if key else name
            if wanted.take(full):
                if not key:
                    raise ConfigError(
                        f"Parameter {name!r} belongs to the model itself; only a submodule's can be adapted."
                    )
                found.append((full, path, name))
    return found, wanted


def targets_of_file(model, prefix, tensors, by_config):
    """[(key, path, module)] named by the keys of an adapter file; a warning where the config names others."""
    named = {k.partition(f".{prefix}")[0].removeprefix("base_model.model.") for k in tensors if f".{prefix}" in k}
    found = [target for target in walk(model) if target[0] in named]
    if by_config and {k for k, _, _ in by_config} != {k for k, _, _ in found}:
        warnings.warn(
            f"Config and state_dict disagree on the adapted layers: the config targets {len(by_config)} modules, the "
            f"state_dict {len(found)}. The state_dict counts.",
            RuntimeWarning,
            stacklevel=5,
        )
    return found


def warn_unused(model, modules, excluded, parameters):
    """Warn about entries of the config's target and exclude lists (`Names`) that match nothing."""
    for what, entries in (("target_modules", modules), ("target_parameters", parameters)):
        for entry in entries.unused():
            names = [key for key, _, _ in walk(model)]
            if any(f".{key}".endswith(f".{entry}") for key in names):
                continue  # it does, but so does a longer entry
            warnings.warn(
                f"{what} names {entry!r}, which matches nothing in the model. Nearest: {nearest(entry, names)}.",
                PeftWarning,
                stacklevel=5,
            )
    if excluded and not excluded.used:
        warnings.warn(
            f"exclude_modules={excluded.spec} excludes no module that target_modules selects.",
            stacklevel=5,
        )


def all_linear(model, task_type=None):
    """Names of all linear layers but the output embedding (and, for sequence classifiers, the head)."""
    linear, skip = [], set()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = HEAD_NAMES if task_type == "SEQ_CLS" else ()
    for key, _, module in walk(model):
        while isinstance(module, AdapterLayer):
            module = module._modules["base_layer"]
        if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or quant.find(module).name):
            continue
        if (output is not None and module is output) or (heads and key.rpartition(".")[2] in heads):
            skip.add(key)
        else:
            linear.append(key)
    return minimal_endings(linear, skip | {k for k, _, _ in walk(model)} - set(linear))


def minimal_endings(names, others):
    """The smallest set of name endings that matches all of `names` and none of `others`."""
    names, others = list(dict.fromkeys(names)), [o.split(".") for o in others if o]
    if "" in names:
        raise ConfigError("A target name is empty; target_modules must name submodules.")
    taken = {".".join(parts[-d:]) for parts in others for d in range(1, len(parts) + 1)}
    chosen = set()
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            ending = ".".join(parts[-depth:])
            if ending not in taken:
                chosen.add(ending)
                break
        else:
            if not any(name.endswith(f".{c}") for c in chosen):
                chosen.add(name)
    return {c for c in chosen if not any(c != o and c.endswith(f".{o}") for o in chosen)}


def pattern_value(patterns, key, default):
    """The value of the first entry of rank_pattern and its kind whose key matches `key` or its ending, as a regex."""
    for pattern, value in (patterns or {}).items():
        if _compiled(rf"(.*\.)?({pattern})$", pattern).match(key):
            return value
    return default


def put(model, path, module):
    """Place a module at a dotted path."""
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
