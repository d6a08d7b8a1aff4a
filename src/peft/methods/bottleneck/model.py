"""The model level of bottleneck adapters: where a variant's adapters belong, taps, invertible adapters, AdapterDrop."""

import torch

from peft.core import match
from peft.core.defaults import BOTTLENECK_SITES
from peft.core.tuner import Tuner
from peft.errors import ConfigError
from peft.methods.bottleneck.adapter import BottleneckLayer, Invertible, tap_of

BOTH, BLOCK, BESIDE = ("attention", "feed_forward"), ("block",), ("beside",)
PLACES = {  # variant: the sites that it adapts
    "houlsby": BOTH,
    "compacter": BOTH,
    "pfeiffer": BLOCK,
    "compacter++": BLOCK,
    "parallel": BESIDE,
    "scaled_parallel": BESIDE,
}


class BottleneckModel(Tuner):
    """A model with bottleneck adapters."""

    layer_cls = BottleneckLayer
    target_module_mapping = BOTTLENECK_SITES
    condenses = False  # tap_modules goes on naming endings of the targets

    def prepare_config(self, config):
        """Fill in where the variant's adapters belong, and widths that the model's config tells."""
        settings = getattr(self.model, "config", None)
        text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
        if config.hidden_size is None and isinstance(getattr(text, "hidden_size", None), int):
            config.hidden_size = text.hidden_size
        sites = self.target_module_mapping.get(getattr(settings, "model_type", "custom"))
        if config.target_modules is None and sites is not None:
            _choose_targets(config, sites)
        super().prepare_config(config)
        if config.invertible and config.invertible_modules is None:
            if sites is None or sites["embedding"] is None:
                raise ConfigError(
                    "Please name the embedding in BottleneckConfig.invertible_modules: there is no default for this "
                    "type of model."
                )
            config.invertible_modules = [sites["embedding"]]

    def _add_to_targets(self, name, config, state_dict, how):
        super()._add_to_targets(name, config, state_dict, how)
        self._collect()
        modules = {key: (path, module) for key, path, module in match.walk(self.model)}
        adapted = [layer.adapters[name].key for layer in self.layers.values() if name in layer.adapters]
        if config.reads != "output":
            for key in dict.fromkeys(tap_of(config, key) for key in adapted):
                if key is not None and key not in modules:
                    raise ConfigError(f"BottleneckConfig.tap_modules names {key}, which is not in the model.")
                if key is not None:
                    self._layer_at(*modules[key]).add_adapter(name, config, key, **how)
        if config.invertible:
            self._add_invertible(name, config, modules, set(adapted), how)

    def _add_invertible(self, name, config, modules, adapted, how):
        wanted, head = match.Names(config.invertible_modules), match.Names(config.invertible_head)
        found = [key for key in modules if wanted.match(key)]
        if len(found) != 1:
            raise ConfigError(
                f"BottleneckConfig.invertible_modules={config.invertible_modules} must name one module, but "
                f"{found or 'none'} match."
            )
        heads = [key for key in modules if head.match(key)]
        if twice := {found[0], *heads} & adapted:
            raise ConfigError(
                f"{sorted(twice)} cannot have a bottleneck and an invertible adapter; take them out of target_modules "
                "or out of invertible_modules and invertible_head."
            )
        source = self._layer_at(*modules[found[0]])
        if source.kind.name == "sublayer":
            first = next(p for p in self.model.parameters() if p.is_floating_point())
            source.kind.elsewhere = first.device, first.dtype
        source.add_adapter(name, config, found[0], **how)
        for key in heads:
            layer = self._layer_at(*modules[key])
            inverse = Invertible(layer, name, key)
            inverse.config, inverse.borrowed, inverse.frozen = config, True, config.inference_mode
            layer._modules["bottleneck_coupling"] = source._modules["bottleneck_coupling"]
            layer.adapters[name] = inverse
            layer._changed()

    def call_arguments(self, args, kwargs):
        """In training, of how many of its first layers each adapter rests in this step (arXiv 2010.11918)."""
        deep = {n: c.drop_first for n, c in self.peft_config.items() if getattr(c, "drop_first", 0)}
        if not deep or not self.training:
            return {}
        return {"resting": {name: int(torch.randint(0, most + 1, ())) for name, most in deep.items()}}


def _choose_targets(config, sites):
    """Let a config name the modules of its variant, in the layers that it asks for."""
    names = PLACES[config.variant]
    picked = config.layers_to_transform
    picked = [picked] if isinstance(picked, int) else picked
    number = r"\d+" if picked is None else f"(?:{'|'.join(map(str, sorted(picked)))})"
    patterns = "|".join(sites[name].replace("{}", number) for name in names)
    config.target_modules = rf"(?:.*\.)?(?:{patterns})"
    config.layers_to_transform = config.layers_pattern = None  # they are in the regex now
    if names == BLOCK and config.renorm is None:
        config.renorm = sites.get("renorm", False)
    if names == BESIDE and config.tap_modules is None:
        config.tap_modules = sites.get("taps")
