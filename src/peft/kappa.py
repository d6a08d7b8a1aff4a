"""KappaTune: adapt the weights with the smallest condition numbers, which hold the least special knowledge
(arXiv 2506.16289)."""

import torch
from torch import nn

from peft import quant
from peft.core import match
from peft.layers.linear import Linear

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")  # how models call 3-D expert parameters


class KappaTuneSelector:
    """Condition numbers of a model's linear layers and expert parameters, computed when first asked for.

    max_dim_size_to_analyze: larger matrices are left out. moe_param_suffixes: endings of expert parameters' names.
    """

    def __init__(self, model, max_dim_size_to_analyze=16384, moe_param_suffixes=None, show_progress=True):
        self.model, self.largest, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.suffixes = tuple(moe_param_suffixes or EXPERTS)
        self._condition_numbers = self._parameter_condition_numbers = None

    def get_best_targets(self, top_p=None, num_modules=None, threshold=None):
        """Names of linear layers, best first: a share top_p of them, that many, or those up to a condition number."""
        self._compute()
        return _best(self._condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(self, top_p=None, num_modules=None, threshold=None):
        """The same of 3-D expert parameters."""
        self._compute()
        return _best(self._parameter_condition_numbers, top_p, num_modules, threshold)

    @torch.no_grad()
    def _compute(self):
        if self._condition_numbers is not None:
            return
        layers = {key: m for key, _, m in match.walk(self.model) if isinstance(m, nn.Linear)}
        experts = {n: p for n, p in self.model.named_parameters() if p.ndim == 3 and n.endswith(self.suffixes)}
        layers, experts = (
            self._fitting(layers, lambda m: Linear().shape(m)),
            self._fitting(experts, lambda p: p.shape[1:]),
        )
        self._condition_numbers = {n: condition(_weight(m)) for n, m in self._watched(layers, "layers")}
        self._parameter_condition_numbers = {
            n: sum(map(condition, p.float())) / len(p) for n, p in self._watched(experts, "expert parameters")
        }

    def _fitting(self, found, shape):
        return {name: t for name, t in found.items() if max(shape(t)) <= self.largest}

    def _watched(self, found, what):
        if not self.show_progress:
            return found.items()
        from tqdm import tqdm

        return tqdm(found.items(), desc=f"Condition numbers of {what}")


def condition(W):
    """The largest singular value of a matrix over the smallest."""
    S = torch.linalg.svdvals(W)
    return float(S[0] / (S[-1] + 1e-8))


def _weight(module):
    backend = quant.find(module)
    return backend.unpack(module, backend.get(module, "weight")).float()


def _best(numbers, top_p, count, threshold):
    names = sorted(numbers, key=numbers.get)
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [n for n in names if numbers[n] <= threshold]


def find_kappa_target_modules(
    model, top_p=0.2, max_dim_size_to_analyze=16384, moe_param_suffixes=None, show_progress=True
):
    """{"target_modules": ..., "target_parameters": ... or None} for a config: the share top_p in the best condition."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": parameters or None}
