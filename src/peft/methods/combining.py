"""What weighted combinations of adapters have in common: the checks, the targets, the modules beside the layers."""

import math

from peft.core.checkpoint import fill
from peft.errors import AdapterError


def check_request(tuner, adapters, weights):
    """Raise AdapterError where these adapters and weights name no combination."""
    configs = tuner.peft_config
    if unknown := [a for a in adapters if a not in configs]:
        raise AdapterError(f"Adapter {unknown[0]} does not exist; there are {list(configs)}.")
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(f"Each adapter needs one weight: got {len(adapters)} adapters and {len(weights)} weights.")
    if not all(map(math.isfinite, weights)):
        raise AdapterError(f"The weights of adapters must be finite numbers, got {weights}.")
    if len({isinstance(configs[a].target_modules, str) for a in adapters}) > 1:
        raise AdapterError(
            "All adapter configs should follow the same target modules type. Combining adapters with `target_modules` "
            "being a mix of list/set and string is not supported."
        )
    twice = [w for w in tuner.extras.values() if len(set(adapters) & set(w.adapter_names)) > 1]
    if twice:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save or "
            f"trainable_token_indices, but found {len(twice)} such instance(s): whole modules are not summed."
        )


def union(specs):
    """One target_modules for several: of sets, or of regexes."""
    if not isinstance(specs[0], str):
        return set().union(*specs)
    specs = list(dict.fromkeys(specs))
    return specs[0] if len(specs) == 1 else "|".join(f"({s})" for s in specs)


def copy_extras(tuner, adapters, name):
    """Whole modules and token rows have one owner among the adapters: the new adapter gets its values."""
    for wrapper in tuner.extras.values():
        owner = next((a for a in adapters if a in wrapper.adapter_names), None)
        if owner is not None:
            for new, old in zip(wrapper.saved_slots(name), wrapper.saved_slots(owner)):
                if new.owner is not None:
                    fill(new, old.tensor)
