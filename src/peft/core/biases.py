"""The base model's own biases, which a config may have trained and saved with its adapter."""

from peft.core import match
from peft.core.layer import AdapterLayer
from peft.core.slots import base_slots
from peft.errors import ConfigError


def mode_of(config):
    """ "none"; "all"; or another name, for those of the adapted layers alone."""
    return getattr(config, "bias", "none")


def check(configs):
    """Raise ConfigError where two adapters of a model, {name: config}, would train the same biases."""
    biased = [n for n, c in configs.items() if mode_of(c) != "none"]
    if len(biased) > 1:
        raise ConfigError(
            f"Only one adapter of a model may train the biases of the base, but {biased} all do. Set bias='none' "
            "for all but one."
        )


def trainers(tuner):
    """Names of the active adapters that train biases."""
    return [n for n in tuner.state.active if mode_of(tuner.peft_config.get(n)) != "none"]


def train(tuner):
    """Let gradients reach the biases that active adapters train."""
    for name in trainers(tuner):
        everywhere = mode_of(tuner.peft_config[name]) == "all"
        modules = (m for _, _, m in match.walk(tuner.model)) if everywhere else tuner.layers.values()
        for module in modules:
            while isinstance(module, AdapterLayer):
                module = module._modules["base_layer"]
            for key, p in module._parameters.items():
                if p is not None and (key == "bias" or key.endswith("_bias")):
                    p.requires_grad = True


def slots_of(model, config, adapter, adapter_name):
    """The slots of the biases that `config.bias` trains. adapter: the slots of the adapter itself."""
    mode = mode_of(config)
    if mode == "none":
        return []
    biases = {k: s for k, s in base_slots(model).items() if k.rpartition(".")[2].endswith("bias")}
    if mode == "all":
        return list(biases.values())
    marker = f".{adapter_name}"
    layers = {s.key.rpartition(marker)[0].rpartition(".")[0] for s in adapter}
    return [s for k, s in biases.items() if k.rpartition(".base_layer.")[0] in layers]
