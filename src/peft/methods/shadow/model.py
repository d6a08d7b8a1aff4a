"""Shadow at model level: a backbone runs before the first adapted block, and the blocks read and update its state."""

import copy

import torch
from torch import nn

from peft.core import match
from peft.core.adapter import module_slots
from peft.core.around import around_forwards, by_name
from peft.core.calls import is_checkpointing
from peft.core.state import Call
from peft.core.tuner import Tuner
from peft.errors import AdapterError, ConfigError
from peft.methods.shadow import diffusion
from peft.methods.shadow.config import MIRROR
from peft.methods.shadow.layer import ShadowLayer

PARTS = ("shadow_backbone", "shadow_projection", "shadow_head")
HEADS = ("score", "classifier")


class ShadowModel(Tuner):
    """A model with Shadow adapters, one of which can be active.

    shadow_backbone    {adapter: the small model beside the base}
    shadow_projection  {adapter: from its width to the base's}
    shadow_head        {adapter: what classifies by its state alone}; language models use the base's
    last_shadow_loss   the loss of what the backbone alone predicted in the latest call with labels
    """

    layer_cls = ShadowLayer
    injectable = False
    last_shadow_loss = None

    # -- making --------------------------------------------------------------------------------------------------
    def prepare_config(self, config):
        """Without targets: all blocks, or those in layers_to_transform, by name."""
        beside, picked = self._beside(), config.layers_to_transform
        picked = None if picked is None else {picked} if isinstance(picked, int) else set(picked)
        if config.target_modules is None:
            names = beside.blocks(self.model)
        elif picked is None or isinstance(config.target_modules, str):
            return
        else:
            targets = match.Names(config.target_modules)
            names = [key for key, _, _ in match.walk(self.model) if targets.match(key)]
        if picked is not None:
            pattern = config.layers_pattern
            names = [n for n in names if match.layer_index(f"{n}.", pattern) in picked]
        if not names:
            raise ConfigError(f"No block of the model is in layers_to_transform={config.layers_to_transform!r}.")
        config.target_modules = set(names)

    def _beside(self):
        """What is special to backbones beside this base model: one of the modules `diffusion` and `backbone`."""
        if diffusion.owns(self.model):
            return diffusion
        from peft.methods.shadow import backbone  # here, as it imports transformers

        if backbone.owns(self.model):
            return backbone
        raise ConfigError(
            "Shadow adapts models of transformers with one stack of blocks, and diffusers' Flux2 transformer; "
            f"{type(self.model).__name__} is neither. Encoder-decoders, other diffusion models and plain modules are "
            "not supported by this version."
        )

    def _add_to_targets(self, name, config, state_dict, how):
        beside = self._beside()
        for part in PARTS:
            if part not in self._modules:
                self._modules[part] = nn.ModuleDict()
        small, projection = beside.make(self.model, config)
        head = self._head(config)
        made = {"shadow_backbone": small, "shadow_projection": projection, **({"shadow_head": head} if head else {})}
        for part, module in made.items():
            self._modules[part][name] = module.requires_grad_(False).train(self.model.training)
        self.shared.setdefault("width", {})[name] = beside.width(self.model.config)
        super()._add_to_targets(name, config, state_dict, how)
        self._collect()
        for i, adapter in enumerate(self._adapters(name)):
            beside.check_block(adapter.key)
            adapter.index = i

    def _head(self, config):
        """A copy of a sequence classifier's head, or None for other tasks."""
        if config.task_type != "SEQ_CLS":
            return None
        found = [getattr(self.model, name, None) for name in HEADS]
        found = [getattr(m, "original_module", m) for m in found]
        return next((copy.deepcopy(m) for m in found if isinstance(m, nn.Linear)), None)

    def _adapters(self, name):
        """The blocks' adapters of one name, in order."""
        return [layer.adapters[name] for layer in self.layers.values() if name in layer.adapters]

    def _remove(self, name):
        for part in PARTS:
            if part in self._modules and name in self._modules[part]:
                del self._modules[part][name]
        super()._remove(name)

    def own_slots(self, adapter_name):
        """The backbone and what belongs to it. Files say "default" where the model has the adapter's name."""
        found = []
        for part in PARTS:
            if adapter_name in self._modules[part]:
                slots = module_slots(self._modules[part][adapter_name], f"{part}.{adapter_name}.")
                for slot in slots:
                    slot.file_key = f"{part}.default{slot.key.removeprefix(f'{part}.{adapter_name}')}"
                found += slots
        return found

    # -- switching -----------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name, inference_mode=False):
        """Let one adapter act, and train its backbone unless it was made for inference."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        if len(names) > 1:
            raise AdapterError(f"One Shadow adapter can act at a time, not {', '.join(names)}.")
        super().set_adapter(names, inference_mode)
        for name in self.shadow_backbone:
            self._train(name, name in names and not inference_mode and not self._adapters(name)[0].frozen)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._train(name, requires_grad)

    def _train(self, name, on):
        for part in PARTS:
            if name in self._modules[part]:
                self._modules[part][name].requires_grad_(on)
        if self.peft_config[name].shadow_model != MIRROR:  # the embeddings of a model that was trained stay as they are
            for stem in self._beside().stems(self.shadow_backbone[name]):
                stem.requires_grad_(False)

    # -- computing -----------------------------------------------------------------------------------------------
    def forward(self, *args, **kwargs):
        if (name := self._acting()) is None:
            return self.model(*args, **kwargs)
        call = Call()
        with self.state.during(call, replay=torch.is_grad_enabled() and is_checkpointing(self.model)):
            run = self._begin(name, call, args, kwargs)
            out = self.model(*args, **kwargs)
        run.keep(out)
        return self._with_loss(name, call.arguments["shadow"][0], run.given, out)

    def generate(self, *args, **kwargs):
        """The base model's generate; the backbone runs before each of its steps."""
        if (name := self._acting()) is None:
            return self.model.generate(*args, **kwargs)
        call, runs = Call(), []

        def begin(args, kwargs):
            runs.append(self._begin(name, call, args, kwargs))

        with self.state.during(call), around_forwards(self.model, begin, lambda out: runs.pop().keep(out)):
            return self.model.generate(*args, **kwargs)

    def _acting(self):
        """The name of the adapter that acts in a call that begins now, or None."""
        call = self.state.call()
        if call is not None and call.names is not None:
            raise AdapterError(
                "adapter_names cannot choose adapters here: a Shadow adapter runs beside the whole model."
            )
        active = [n for n in self.state.active if n in self.peft_config]
        return active[0] if active and self.state.enabled else None

    def _begin(self, name, call, args, kwargs):
        """Run the backbone, or let the first block with the adapter do so; its projected output is the state there."""
        adapters, projection = self._adapters(name), self.shadow_projection[name]
        given = by_name(self.model, args, kwargs)
        run = self._beside().Run(self.model, self.shadow_backbone[name], self.peft_config[name], given)
        call.arguments["shadow"] = states = [None] * len(adapters)
        call.arguments["shadow_grad"] = torch.is_grad_enabled()
        if run.state is not None:
            states[0] = projection(run.state)
            return run

        def reach(layer, args, kwargs):
            if layer is adapters[0].layer:
                states[0] = projection(run.at(by_name(layer.get_base_layer(), args, kwargs)))

        call.arguments["shadow_reach"] = reach
        return run

    def _with_loss(self, name, state, given, out):
        """The output, with the weighted loss of what the backbone alone predicts added to its loss."""
        config, labels, loss = self.peft_config[name], given.get("labels"), getattr(out, "loss", None)
        if labels is None or loss is None or not config.auxiliary_loss_weight:
            return out
        from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss

        from peft.methods.shadow.backbone import last_tokens

        if config.task_type == "CAUSAL_LM" and (head := self.model.get_output_embeddings()) is not None:
            logits, items = head(state), given.get("num_items_in_batch")
            auxiliary = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=items)
        elif name in self.shadow_head:
            logits = self.shadow_head[name](last_tokens(state, given.get("attention_mask")))
            auxiliary = ForSequenceClassificationLoss(labels, logits, self.model.config)
        else:
            return out
        self.last_shadow_loss = auxiliary.detach()
        out.loss = loss + config.auxiliary_loss_weight * auxiliary.to(loss.dtype)
        return out

    def unload_shadow(self, adapter_name=None, copy=False):
        """The backbone with its head, as a model of its own: what it alone has learned.

        adapter_name: default the active one. copy: share no tensors with this model.
        """
        name = next(iter(self.state.active), None) if adapter_name is None else adapter_name
        if name not in self.peft_config:
            raise AdapterError(f"Adapter {name} does not exist; there are {list(self.peft_config)}.")
        return self._beside().alone(self, name, copy)
