"""The table that the laws run over: one line adds a method, an option or a layer kind.

`oracle` files a float64 weight of the base under what the adapter's saved tensors say it should become; it is written
from the papers' formulas and shares no code with the package.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from case import cards
from example import Example
from models import noise
from torch import nn

import peft


def lora(name: str, base: str, target: Any, **options: Any) -> Example:
    """A LoRA example; options that are fields of `Example` are taken as such."""
    fields = ("identity", "merges", "rows", "tolerance", "frozen", "compiles", "adds_bias")
    about = {k: options.pop(k) for k in fields if k in options}
    return Example(name, base, {"r": 4, "lora_alpha": 6, "target_modules": target, **options}, **about)


LAYER, BOTH = ["layer"], ["lin0", "lin1"]
NEAR = {"identity": 1e-5}
EXAMPLES = [
    lora("linear", "mlp", BOTH),
    lora("linear_3d_input", "sequence", BOTH),
    lora("linear_no_bias", "no_bias", LAYER),
    lora("rslora", "mlp", BOTH, use_rslora=True),
    lora("ranks", "mlp", BOTH, rank_pattern={"lin0": 2}, alpha_pattern={"lin1": 3}),
    lora("dora", "mlp", BOTH, use_dora=True, **NEAR),
    lora("dora_no_bias", "no_bias", LAYER, use_dora=True, **NEAR),
    lora("lora_bias", "mlp", BOTH, lora_bias=True),
    lora("lora_bias_no_bias", "no_bias", LAYER, lora_bias=True, adds_bias=True),
    lora("dropout", "mlp", BOTH, lora_dropout=0.2),
    lora("dora_dropout", "mlp", BOTH, lora_dropout=0.2, use_dora=True, **NEAR),
    lora("gaussian", "mlp", BOTH, init_lora_weights="gaussian"),
    lora("orthogonal", "mlp", BOTH, init_lora_weights="orthogonal", **NEAR),
    lora("pissa", "mlp", BOTH, init_lora_weights="pissa", **NEAR),
    lora("pissa_niter", "mlp", BOTH, init_lora_weights="pissa_niter_4", **NEAR),
    lora("pissa_dora", "mlp", BOTH, init_lora_weights="pissa", use_dora=True, **NEAR),
    lora("olora", "mlp", BOTH, init_lora_weights="olora", **NEAR),
    lora("mica", "mlp", BOTH, init_lora_weights="mica", frozen=("lora_B",)),
    lora("random", "mlp", BOTH, init_lora_weights=False, identity=None),
    lora("transposed", "transposed", LAYER, fan_in_fan_out=True),
    lora("transposed_dora", "transposed", LAYER, fan_in_fan_out=True, use_dora=True, **NEAR),
    lora("transposed_pissa", "transposed", LAYER, fan_in_fan_out=True, init_lora_weights="pissa", **NEAR),
    lora("transposed_dropout", "transposed", LAYER, fan_in_fan_out=True, lora_dropout=0.2),
    lora("conv1", "conv1", LAYER),
    lora("conv2", "conv2", LAYER),
    lora("conv3", "conv3", LAYER),
    lora("conv_grouped", "grouped", LAYER, merges=False),
    lora("conv_dilated", "dilated", LAYER),
    lora("conv_reflect", "reflect", LAYER),
    lora("conv_circular", "circular", LAYER),
    lora("conv_same", "same", LAYER),
    lora("conv_dora", "conv2", LAYER, use_dora=True, **NEAR),
    lora("conv1_dora", "conv1", LAYER, use_dora=True, **NEAR),
    lora("conv_bias", "conv2", LAYER, lora_bias=True),
    lora("conv_dropout", "conv2", LAYER, lora_dropout=0.2),
    lora("embedding", "embedded", ["emb"]),
    lora("embedding_and_head", "embedded", ["emb", "lin"]),
    lora("embedding_dora", "embedded", ["emb"], use_dora=True, **NEAR),
    lora("embedding_random", "embedded", ["emb"], init_lora_weights=False, identity=None),
    lora("attention", "attention", ["mha", "head"], rows=False),
    lora("parameter_2d", "parameters", [], target_parameters=["matrix.weight"], rows=False),
    lora("parameter_3d", "parameters", [], target_parameters=["experts.w1"], rows=False),
    lora("parameters_3d", "parameters", ["lin"], target_parameters=["experts.w1", "experts.w2"], rows=False),
    lora("saved_head", "mlp", ["lin0"], modules_to_save=["lin1"]),
    lora("tokens_beside", "embedded", ["lin"], trainable_token_indices={"emb": [3, 5, 19]}),
    Example(
        "tokens",
        "embedded",
        {"target_modules": ["emb"], "token_indices": [3, 5, 19]},
        "TRAINABLE_TOKENS",
        casts=False,
        oracle=lambda config, tensors, weights, state: state["emb.weight"].__setitem__(
            config.token_indices, tensors["emb.trainable_tokens_delta"]
        ),
    ),
]
EXAMPLES += [example for card in cards().values() for example in card.EXAMPLES]
BY_NAME = {e.name: e for e in EXAMPLES}
SOME = [BY_NAME[n] for n in ("linear", "dora", "pissa", "conv2", "embedding", "attention", "parameters_3d", "tokens")]


def quiet(function: Any) -> Any:
    """The function, without the package's warnings: they have tests of their own."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return call


def under_checkpointing(make: Any, reentrant: bool, **batch: Any) -> list[list[torch.Tensor]]:
    """Gradients of all that is trained of a model that `make` gives, without checkpointing and with it."""
    grads = []
    for checkpointing in (False, True):
        model = make().train()
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        model(**batch, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    return grads


@torch.no_grad()
def train_a_little(model: nn.Module, name: str = "default", seed: int = 1000) -> None:
    """Move all parameters of one adapter away from their start, whether it is active or not."""
    for i, slot in enumerate(s for s in peft_slots(model, name) if isinstance(s.tensor, nn.Parameter)):
        step = noise(slot.tensor.shape, seed + i) * (0.2 if slot.tensor.ndim > 1 else 0.1)
        slot.tensor.add_(step.to(slot.tensor.dtype))


def peft_slots(model: nn.Module, name: str) -> list:
    """What a file holds of an adapter, as places in the model."""
    from peft.core.checkpoint import adapter_slots

    return adapter_slots(model, name)


@quiet
def wrapped(
    example: Example, dtype: torch.dtype = torch.float32, trained: bool = True, base: Any = None, **changes: Any
) -> Any:
    """The base (another one, if given) with the example's adapter, in eval mode."""
    torch.manual_seed(0)
    base = example.make_base(dtype) if base is None else base
    model = peft.get_peft_model(base, example.make_config(**changes))
    if trained:
        train_a_little(model)
    return bound(model.eval(), example)


def bound(model: Any, example: Example) -> Any:
    """The model, given the example's further arguments at every call."""
    if example.call:
        model.register_forward_pre_hook(_AddArguments(example.call), with_kwargs=True)
    return model


class _AddArguments:
    """A hook; a class, so that it can be pickled."""

    def __init__(self, call: dict[str, Any]) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**self.call, **kwargs}


@quiet
def with_second(example: Example, dtype: torch.dtype = torch.float32, base: Any = None) -> Any:
    """The base with two adapters, "default" and "second"; the first is active."""
    model = wrapped(example, dtype, base=base)
    model.add_adapter("second", example.make_config(**example.second))
    train_a_little(model, "second", 5000)
    return model.eval()


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest wanted value."""
    scale = wanted.double().abs().max().clamp(min=1e-3)
    return float((found.double() - wanted.double()).abs().max() / scale)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base model's tensors under their names without adapters."""
    from peft.core.checkpoint import get_base_model_state_dict

    return {k: v.clone() for k, v in get_base_model_state_dict(model).items()}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two dicts hold the same keys and bits."""
    return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if hasattr(a, "__tensor_flatten__"):  # made of several, which know more operations than it does
        return type(a) is type(b) and all(_same(getattr(a, n), getattr(b, n)) for n in a.__tensor_flatten__()[0])
    return torch.equal(a, b) and a.dtype == b.dtype


# -- the oracle --------------------------------------------------------------------------------------------------
def oracle(example: Example, model: nn.Module, names: tuple[str, ...] = ("default",)) -> nn.Module:
    """A float64 base model with the adapters' effect written into its weights, or None where no formula is known."""
    if example.oracle is None and (example.method != "LORA" or not example.merges):
        return None
    base = example.make_base(torch.float32).double()
    weights = {k: v.double() for k, v in example.make_base(torch.float32).state_dict().items()}
    state = {k: v.clone() for k, v in weights.items()}
    if example.adds_bias:
        base.layer.bias = nn.Parameter(torch.zeros(12, dtype=torch.float64))
        state["layer.bias"] = torch.zeros(12, dtype=torch.float64)
    for name in names:
        _add(example, model.peft_config[name], peft.get_peft_model_state_dict(model, adapter_name=name), weights, state)
    base.load_state_dict(state)
    return base.eval()


def _add(example: Example, config: Any, tensors: dict[str, torch.Tensor], weights: dict, state: dict) -> None:
    tensors = {
        k.removeprefix("base_model.model."): v.double() if v.is_floating_point() else v for k, v in tensors.items()
    }
    if example.oracle is not None:
        tensors = {k.removeprefix("base_model."): v for k, v in tensors.items()}
        example.oracle(config, tensors, weights, state)
        return
    for key in [k for k in tensors if k.endswith(("lora_A.weight", "lora_embedding_A"))]:
        path, embedding = key.rpartition(".lora_")[0], key.endswith("lora_embedding_A")
        A = tensors[key]
        B = tensors[key.replace("_A", "_B")]
        target, weight_of = _weight_for(example, path, weights, tensors)
        r = config.rank_pattern.get(path, config.r)
        s = config.alpha_pattern.get(path, config.lora_alpha) / (r**0.5 if config.use_rslora else r)
        W = weight_of(weights[target])
        delta = s * _product(A, B, W)
        if config.init_lora_weights in ("pissa", "pissa_niter_4", "olora"):
            from peft.methods.lora.inits import subtracted

            A0, B0 = subtracted(config.init_lora_weights, W.float(), r, s)  # its values are arbitrary, its use is not
            delta = delta - s * B0.double() @ A0.double()
        new = W + delta
        if config.use_dora:
            m = tensors[f"{path}.lora_magnitude_vector"].flatten()
            norm = new.flatten(1).norm(dim=1)
            new = new * (m / norm).reshape(-1, *[1] * (new.ndim - 1))
        transposed = embedding or example.base == "transposed"
        state[target] = state[target] + ((new - W).T if transposed else new - W)
        if config.lora_bias and f"{path}.bias" in state:
            state[f"{path}.bias"] = state[f"{path}.bias"] + s * tensors[f"{path}.lora_B.bias"]
    for key, value in tensors.items():
        if "lora_" not in key and "token_adapter" not in key and key in state:
            state[key] = value
        if key.endswith("token_adapter.trainable_tokens_delta"):
            state["emb.weight"][config.trainable_token_indices["emb"]] = value


def _weight_for(example: Example, path: str, weights: dict, tensors: dict) -> tuple[str, Any]:
    """The base tensor that the adapter at `path` changes, and how to read it as (out, in, ...)."""
    if example.base == "transposed" or f"{path}.lora_embedding_A" in tensors:
        return f"{path}.weight", lambda W: W.T
    if example.base == "attention" and path.startswith("mha"):
        return ("mha.in_proj_weight" if path == "mha" else "mha.out_proj.weight"), lambda W: W
    if example.base == "parameters" and path.startswith("experts"):
        wanted = [p.rpartition(".")[2] for p in example.config["target_parameters"]]
        return f"experts.{wanted[-1] if path == 'experts' else wanted[0]}", lambda W: W
    return f"{path}.weight", lambda W: W


def _product(A: torch.Tensor, B: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    if W.ndim == 3 and A.ndim == 2:  # experts: A stacks them, B interleaves them
        E = W.shape[0]
        r = A.shape[0] // E
        return torch.stack([B[:, e::E] @ A[e * r : (e + 1) * r] for e in range(E)])
    if A.ndim > 2:
        return torch.einsum("or,r...->o...", B.flatten(1), A)
    return B @ A
