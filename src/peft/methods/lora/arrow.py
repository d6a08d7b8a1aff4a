"""Arrow: each token goes to the LoRA adapters whose strongest input direction it is most aligned with, without training
(arXiv 2405.11157); and GenKnowSub, which first takes general knowledge out of them (arXiv 2505.10939)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from peft.core.adapter import Adapter
from peft.core.validate import check_fields, check_range
from peft.errors import AdapterError, ConfigError
from peft.methods.lora.config import LoraConfig
from peft.methods.lora.lora import Lora
from peft.model import PeftModel
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.ops.sources import Sources

ROUTER, TASK, GENERAL = "arrow_router", "task", "gks"


@dataclass
class ArrowConfig:
    """How tokens are routed, and among which adapters."""

    top_k: int = field(default=3, metadata={"help": "adapters that act on a token; all, if there are fewer"})
    router_temperature: float = field(default=1.0, metadata={"help": "of the softmax over their alignments"})
    use_gks: bool = field(default=False, metadata={"help": "subtract the mean of general adapters' factors"})
    task_adapter_names: list[str] | None = field(
        default=None, kw_only=True, metadata={"help": "the adapters to choose from; set by create_arrow_model"}
    )
    gks_adapter_names: list[str] | None = field(
        default=None, kw_only=True, metadata={"help": "the general adapters; set by create_arrow_model"}
    )
    rng_seed: int | None = field(default=None, metadata={"help": "for old files; directions are computed exactly"})

    def __post_init__(self):
        check_fields(self)
        check_range(self, "top_k", 1)
        check_range(self, "router_temperature", above=0)


class Arrow(Lora):
    """y + Σ w_e·s_e·B_e A_e x over the task adapters e on the layer; w = softmax of the top_k |⟨x, v_e⟩|, else 0.

    v_e is the first right singular vector of B_e A_e, computed exactly from the factors and anew when they change;
    upstream iterates from a random start. With GKS, the factors are A_e − mean A_g and B_e − mean B_g, of copies:
    upstream overwrites the task adapters with them. The router's own A and B do nothing; files have them.
    """

    kinds = ("linear",)
    title, converts = "Arrow router", False
    delta, merged_weight = Adapter.delta, Adapter.merged_weight  # depends on the token: cannot be merged
    experts = None  # (Sources, v of each (E, in), stacked A (R, in), stacked B (out, R), scaling of each row of A (R,),
    #                  which row of A is whose (R,))

    def low_rank(self):
        return None

    def output(self, x, y):
        _, directions, A, B, scaling, owner = self._experts()
        c, drop = self.config.arrow_config, self.pair(A, B, None).dropout
        exact = torch.promote_types(x.dtype, torch.float32)
        alignment = F.linear(x.to(exact), directions.to(exact)).abs()
        best, chosen = alignment.topk(min(c.top_k, len(directions)), dim=-1)
        best = torch.softmax(best / c.router_temperature, dim=-1)
        weights = torch.zeros_like(alignment).scatter(-1, chosen, best)
        acts = weights[..., owner] * scaling  # a pair of factors whose inner activations are weighted: no loop
        return y + lowrank.update(x, LowRank(A, B, 1.0, drop), acts).to(y.dtype)

    def _experts(self):
        if self.experts is None or not self.experts[0].unchanged():
            tasks, general = (self._named(names) for names in self._names())
            values = [(self.layer.__dict__["scaling"], a.name) for a in tasks]
            sources = Sources([p for a in tasks + general for p in a.places()], values)
            made = (sources, *_stacked(tasks, general))
            if made[2].requires_grad:  # they are being trained: each forward has a graph of its own
                return made
            self.experts = made
        return self.experts

    def _names(self):
        c = self.config.arrow_config
        if not c.task_adapter_names or (c.use_gks and not c.gks_adapter_names):
            raise AdapterError(
                f"The Arrow router {self.name!r} does not know its adapters: set task_adapter_names (and, with "
                "use_gks, gks_adapter_names) in its ArrowConfig, or make the model with create_arrow_model."
            )
        return c.task_adapter_names, c.gks_adapter_names if c.use_gks else ()

    def _named(self, names):
        found = [self.layer.adapters.get(n) for n in names]
        for name, a in zip(names, found):
            if a is None:
                raise AdapterError(
                    f"The Arrow router {self.name!r} chooses among {list(names)}, but there is no {name!r} on "
                    f"{self.key}: {list(self.layer.adapters)}. All of them must be loaded, for the same layers."
                )
            if not a.converts or a.lora_magnitude_vector is not None or a.lora_B.bias is not None:
                raise AdapterError(
                    f"The Arrow router {self.name!r} cannot use {name!r}: it takes LoRA adapters without magnitudes "
                    "(DoRA), biases or routing of their own."
                )
        return found


def _stacked(tasks, general):
    """What `Arrow.experts` holds, but for the sources."""
    pairs = [a.effective_factors() for a in tasks]
    if general:
        means = [sum(t) / len(general) for t in zip(*(a.effective_factors() for a in general))]
        if any(A.shape != means[0].shape or B.shape != means[1].shape for A, B in pairs):
            raise AdapterError("use_gks subtracts factors, so all task and general adapters need the same rank.")
        pairs = [(A - means[0], B - means[1]) for A, B in pairs]
    ranks = torch.tensor([len(A) for A, _ in pairs])
    A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    scaling = torch.tensor([float(a.scaling) for a in tasks]).repeat_interleave(ranks).to(A.device)
    owner = torch.arange(len(pairs)).repeat_interleave(ranks).to(A.device)
    with torch.no_grad():
        directions = torch.stack([_direction(A.float(), B.float()) for A, B in pairs])
    return directions, A, B, scaling, owner


def _direction(A, B):
    """The first right singular vector of BA, from matrices of the size of A only."""
    return torch.linalg.svd(torch.linalg.qr(B)[1] @ A, full_matrices=False)[2][0]


def create_arrow_model(
    base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths=None, **adapter_kwargs
):
    """A base model with LoRA adapters from files, "task_0" and so on, and "arrow_router", active, that chooses of them.

    general_adapter_paths: files of adapters of general knowledge, "gks_0" and so on, if arrow_config.use_gks.
    adapter_kwargs: for loading, as `PeftModel.load_adapter` takes them. Raises ConfigError for missing paths,
    AdapterError for adapters that are not on the same layers.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("task_specific_adapter_paths is empty: name at least one adapter to route to.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("use_gks=True needs general_adapter_paths: what would be subtracted?")
    general_adapter_paths = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    paths = {f"{TASK}_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = {f"{GENERAL}_{i}": path for i, path in enumerate(general_adapter_paths)}
    first, *others = paths | general
    model = PeftModel.from_pretrained(base_model, paths[first], adapter_name=first, **adapter_kwargs)
    for name in others:
        model.load_adapter((paths | general)[name], adapter_name=name, **adapter_kwargs)
    for layer in model.base_model.layers.values():
        if missing := [n for n in paths | general if n not in layer.adapters]:
            key = next(iter(layer.adapters.values())).key
            raise AdapterError(
                f"Arrow needs adapters of the same layers, but {missing[0]!r} has nothing on {key}, which "
                f"{next(iter(layer.adapters))!r} adapts."
            )
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(paths), list(general)
    config = model.peft_config[first]
    router = LoraConfig(arrow_config=arrow_config, r=config.r, target_modules=config.target_modules)
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model
