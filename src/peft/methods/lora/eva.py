"""EVA: A starts as the principal components of each layer's inputs, and ranks go where they explain most
(arXiv 2410.07170)."""

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from peft.core import match
from peft.core.checkpoint import PREFIX
from peft.errors import ConfigError, PeftWarning
from peft.ops.incremental_pca import IncrementalPCA

RHO_LIMIT = 1000  # from here on rho means: as much as fits


@dataclass
class EvaConfig:
    """How ranks are chosen. Wrong values raise ConfigError, naming the field."""

    rho: float = field(default=2.0, metadata={"help": "a layer gets at most rho * r ranks; 1: all the same"})
    tau: float = field(default=0.99, metadata={"help": "cosine between two steps at which a component has converged"})
    use_label_mask: bool = field(default=True, metadata={"help": "only tokens that have a label count"})
    label_mask_value: int = field(default=-100, metadata={"help": "the label of tokens that have none"})
    whiten: bool = field(default=False, metadata={"help": "scale components by their singular values"})
    adjust_scaling_factors: bool = field(
        default=True, metadata={"help": "keep lora_alpha / r as it was when r changes"}
    )

    def __post_init__(self):
        if not self.rho >= 1:
            raise ConfigError(f"EvaConfig.rho must be at least 1, got {self.rho!r}.")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"EvaConfig.tau must be between 0 and 1, got {self.tau!r}.")


# -- which inputs count --------------------------------------------------------------------------------------------
def forward_fn_dict(model, inputs):
    """Call a model with a dict of inputs."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input, peft_config):
    """Indices (tokens, 2) of the tokens in a batch that count: neither padding nor, if so configured, without label."""
    if not isinstance(model_input, dict):
        raise TypeError(f"A batch of a language model must be a dict, got {type(model_input).__name__}.")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input, model_input, layer_name):
    """A layer's inputs (tokens, features) at the indices that `prepare_model_inputs_fn_language_modeling` gave."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def flat_inputs(layer_input, model_input, layer_name):
    """All of a layer's inputs as (samples, features)."""
    return _tensor(layer_input, layer_name).flatten(0, -2)


def _tensor(layer_input, name):
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"The input of {name} is a {type(x).__name__}; give a prepare_layer_inputs_fn that reads it.")
    return x


# -- the analysis --------------------------------------------------------------------------------------------------
class Analysis:
    """The components of the inputs of some layers; layers that get the same input share one.

    modules   {layer name: module}
    limit     {layer name: most components that it may get}
    leader    {layer name: the layer whose components it uses}
    """

    def __init__(self, modules, config, prepare, gather):
        self.modules, self.config, self.prepare, self.gather = modules, config, prepare, gather
        ranks = {n: match.pattern_value(config.rank_pattern, n, config.r) for n in modules}
        self.budget = sum(ranks.values())
        rho = config.eva_config.rho
        if rho > RHO_LIMIT:
            rho = min(rho, max(max(m.weight.shape) for m in modules.values()) // config.r)
        self.limit = {n: round(r * rho) for n, r in ranks.items()}
        self.leader, self.pca, self.stable = {}, {}, {}

    def inputs(self, forward, model_input, names):
        """{layer name: samples (n, features)} that a forward gives the layers."""
        seen = {}

        def hook(name):
            def keep(module, args, output):
                seen[name] = self.gathered(self.prepare[name](args, model_input, name))

            return keep

        handles = [self.modules[n].register_forward_hook(hook(n)) for n in names]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def gathered(self, x):
        """The samples of all processes."""
        if not (self.gather and dist.is_initialized()):
            return x
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, x.cpu())
        return torch.cat(parts).to(x.device)

    def group(self, seen):
        """Find layers with equal inputs: their limits become equal too."""
        for name, x in seen.items():
            alike = (n for n in self.pca if seen[n].shape == x.shape and torch.equal(seen[n], x))
            leader = self.leader[name] = next(alike, name)
            if leader == name:
                self.pca[name] = None
        for name, leader in self.leader.items():
            self.limit[leader] = max(self.limit[leader], self.limit[name])
        for name, leader in self.leader.items():
            self.limit[name] = self.limit[leader]
        for name in self.pca:
            self.pca[name] = IncrementalPCA(self.limit[name], lowrank=True, lowrank_seed=42)
            self.stable[name] = torch.zeros(self.limit[name], dtype=torch.bool)

    def take_in(self, name, x):
        pca = self.pca[name]
        if len(x) < self.limit[name]:
            return
        before = pca.components_ if pca.n_samples_seen_ else None
        pca.partial_fit(x.float())
        if before is not None:
            self.stable[name] = (F.cosine_similarity(pca.components_, before) >= self.config.eva_config.tau).cpu()

    def started(self):
        return all(pca.n_samples_seen_ for pca in self.pca.values())

    def ranks(self):
        """{layer name: rank}: the budget goes to the components that explain the largest share of their inputs."""
        shares = [(n, s) for n in self.leader for s in self.pca[self.leader[n]].explained_variance_ratio_]
        order = torch.stack([s for _, s in shares]).argsort(descending=True)
        counts = Counter(shares[i][0] for i in order[: self.budget])
        ranks = {n: counts[n] for n in self.leader}
        for name, leader in self.leader.items():
            if ranks[leader] < ranks[name]:
                ranks[leader], ranks[name] = ranks[name], ranks[leader]
        return ranks

    def components(self, ranks):
        """{layer name: components (rank, features)}."""
        found = {}
        for name, rank in ranks.items():
            pca = self.pca[self.leader[name]]
            found[name] = pca.components_[:rank].clone()
            if self.config.eva_config.whiten:
                found[name] /= pca.singular_values_[:rank].sqrt()[:, None]
        return found


@torch.no_grad()
def get_eva_state_dict(
    model,
    dataloader,
    peft_config=None,
    forward_fn=forward_fn_dict,
    prepare_model_inputs_fn=prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn=prepare_layer_inputs_fn_language_modeling,
    adapter_name="default",
    gather_distributed_inputs=True,
    show_progress_bar=True,
):
    """{layer name: A (rank, in)} for the targets of a LoRA config, from the inputs that they get; of a PeftModel, for
    the layers that the adapter is on.

    dataloader: batches, gone through until the components stand still. forward_fn(model, batch).
    prepare_model_inputs_fn(batch, config): what the next one gets, None: the batch.
    prepare_layer_inputs_fn(layer_input, that, layer_name): samples (n, in); one function, a dict by layer, or None.
    Raises ValueError for an empty dataloader, or a plain model without peft_config.
    """
    wrapped = hasattr(model, "peft_config")
    if not wrapped and peft_config is None:
        raise ConfigError("get_eva_state_dict needs peft_config for a model that has none.")
    config = model.peft_config[adapter_name] if peft_config is None else peft_config
    if not len(dataloader):
        raise ConfigError("The dataloader is empty: EVA needs batches to look at.")
    modules = _adapted(model, adapter_name) if wrapped else _targets(model, config)
    prepare = _by_layer(prepare_layer_inputs_fn, modules)
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if wrapped else contextlib.nullcontext():
            analysis = Analysis(modules, config, prepare, gather_distributed_inputs)
            run(analysis, model, dataloader, forward_fn, prepare_model_inputs_fn, show_progress_bar)
    finally:
        model.train(training)
    return analysis.components(analysis.ranks())


def run(analysis, model, dataloader, forward_fn, prepare_model_inputs, show_progress):
    """Feed batches until every component that is going to be used has converged."""
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    bar = None
    if show_progress and not (dist.is_initialized() and dist.get_rank()):
        from tqdm import tqdm

        bar = tqdm(desc="EVA: batches", leave=False)
    ranks = None
    for i, batch in enumerate(itertools.chain([next(iter(dataloader))], itertools.cycle(dataloader))):
        batch = _moved(batch, device)
        what = batch if prepare_model_inputs is None else prepare_model_inputs(batch, analysis.config)
        forward = lambda batch=batch: forward_fn(model, batch)  # noqa: E731
        if not i:  # the first batch only tells which layers get the same
            analysis.group(analysis.inputs(forward, what, list(analysis.modules)))
            continue
        waiting = [n for n, s in analysis.stable.items() if ranks is None or not s[: ranks[n]].all()]
        if not waiting:
            break
        for name, x in analysis.inputs(forward, what, waiting).items():
            analysis.take_in(name, x)
        ranks = analysis.ranks() if analysis.started() else None
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _adapted(model, name):
    layers = model.base_model.layers.items()
    return {PREFIX + path: m for path, m in layers if name in m.adapters and m.kind.name == "linear"}


def _targets(model, config):
    config = replace(config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == match.ALL_LINEAR:
        config.target_modules = match.all_linear(model, config.task_type)
    linear = {key: m for key, _, m in match.walk(model) if hasattr(m, "in_features") or type(m).__name__ == "Conv1D"}
    if config.target_modules is None:
        return linear
    return {key: m for key, _, m in match.target_modules(model, config, ())[0] if key in linear}


def _by_layer(prepare, modules):
    if not isinstance(prepare, Mapping):
        return dict.fromkeys(modules, prepare or flat_inputs)
    if unknown := [n for n in prepare if n not in modules]:
        raise ConfigError(f"prepare_layer_inputs_fn names layers that the model does not have: {unknown}.")
    return {n: prepare.get(n) or flat_inputs for n in modules}


def _moved(batch, device):
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    return type(batch)(_moved(v, device) for v in batch) if isinstance(batch, (tuple, list)) else batch


# -- the adapter -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def initialize_lora_eva_weights(
    model,
    dataloader=None,
    eva_state_dict=None,
    forward_fn=forward_fn_dict,
    prepare_model_inputs_fn=prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn=prepare_layer_inputs_fn_language_modeling,
    adapter_name="default",
    gather_distributed_inputs=True,
    show_progress_bar=True,
):
    """Give an adapter made with init_lora_weights="eva" its ranks and its A; its config says what it became.

    eva_state_dict: what `get_eva_state_dict` gave, else it is worked out from `dataloader`; the other arguments are as
    there. Layers that get rank 0 lose their adapter. Raises ValueError for models and adapters that this is not for.
    """
    if not hasattr(model, "peft_config"):
        raise ConfigError("initialize_lora_eva_weights needs a PeftModel; wrap the model with get_peft_model first.")
    if len(model.active_adapters) > 1:
        raise ConfigError("initialize_lora_eva_weights works with one active adapter at a time.")
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ConfigError(f"Adapter {adapter_name!r} was not made with init_lora_weights='eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("Give a dataloader, or the eva_state_dict that one has led to.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    restart(model.base_model, adapter_name, {k.removeprefix(PREFIX): A for k, A in eva_state_dict.items()})


def restart(tuner, name, components):
    """Make an adapter anew with these A's. components: {layer path: A (rank, in)}; others start as usual."""
    config = tuner.peft_config[name]
    ranks, alphas, kept, missing = {}, {}, [], []
    for path, layer in tuner.layers.items():
        if (adapter := layer.adapters.get(name)) is None:
            continue
        r, alpha = adapter.r, adapter.lora_alpha
        if (A := components.get(path)) is None:
            missing.append(path)
        elif len(A) not in (0, r):
            alpha = alpha * len(A) / r if config.eva_config.adjust_scaling_factors else alpha
            r = len(A)
        if A is not None and not len(A):
            continue
        kept.append(path)
        ranks |= {adapter.key: r} if r != config.r else {}
        alphas |= {adapter.key: alpha} if alpha != config.lora_alpha else {}
    keys = {path: layer.adapters[name].key for path, layer in tuner.layers.items() if name in layer.adapters}
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.target_modules = {keys[path] for path in kept}
    for path, layer in tuner.layers.items():
        if path in kept:
            layer.add_adapter(name, config, keys[path])
            if (A := components.get(path)) is not None:
                layer.adapters[name].factors()[0].copy_(A)
        else:
            layer.delete_adapter(name)
    tuner.unwrap_empty()
    if missing:
        warnings.warn(
            f"EVA found nothing for {missing}: they start with init_lora_weights=True.", PeftWarning, stacklevel=4
        )
