"""Bottleneck adapters beyond the laws: their formula, where they sit by default, taps, AdapterDrop, invertible ones."""

from __future__ import annotations

import copy
import threading
import warnings

import example
import models
import pytest
import torch
import torch.nn.functional as F
from laws_table import gap, train_a_little
from models import noise

import peft
from peft import BottleneckConfig, LoraConfig, get_peft_model
from peft.core.defaults import BOTTLENECK_SITES
from peft.errors import AdapterError, CheckpointError, ConfigError
from peft.methods.bottleneck.invertible import Coupling

X = noise((3, 5, models.WIDTH), 7)
NEW_GELU = {"gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))}
F_OF = {"relu": torch.relu, "tanh": torch.tanh, "swish": lambda x: x * torch.sigmoid(x), **NEW_GELU}


def residual(trained=True, **config):
    """The smallest block, with adapters moved from their start, and its tensors in float64."""
    torch.manual_seed(0)
    model = get_peft_model(models.fill(example.Residual()), BottleneckConfig(bottleneck_size=4, **config)).eval()
    if trained:
        train_a_little(model)
    tensors = {
        k.removeprefix("base_model.model."): v.double() for k, v in peft.get_peft_model_state_dict(model).items()
    }
    return model, tensors


# -- the formula -----------------------------------------------------------------------------------------------------
def norm(x, w, b):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w + b


def added(t, key, z, f, s=1.0, y=None):
    """What a bottleneck makes of z, from the tensors of its file; with y the sum of both, normed."""
    get = lambda name: t.get(f"{key}.bottleneck_{name}")  # noqa: E731
    h = z if get("norm_before.weight") is None else norm(z, get("norm_before.weight"), get("norm_before.bias"))
    h = F_OF[f](h @ get("down.weight").T + get("down.bias")) @ get("up.weight").T + get("up.bias")
    h = h * (s if get("scale") is None else get("scale"))
    if get("gate.weight") is not None:
        gate = torch.sigmoid(z @ get("gate.weight").T + get("gate.bias"))
        h = h * gate.mean(1, keepdim=True)
    h = h if y is None else h + y
    return h if get("norm_after.weight") is None else norm(h, get("norm_after.weight"), get("norm_after.bias"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"non_linearity": "relu", "scaling": 0.5}, "output"),
        ({"scaling": "learned", "gating": True}, "output"),
        ({"scaling": "channel", "norm_before": True, "norm_after": True, "non_linearity": "gelu_new"}, "output"),
        ({"norm_after": True, "residual_before_norm": True, "non_linearity": "tanh", "scaling": 2.0}, "sum"),
        ({"variant": "parallel", "non_linearity": "tanh"}, "input"),
        ({"variant": "parallel", "tap_modules": {"lin0": "before"}, "non_linearity": "tanh"}, "stream"),
        ({"reads": "both", "tap_modules": {"lin0": "before"}}, "both"),
        ({"target_modules": ["after"], "renorm": True}, "renorm"),
        ({"target_modules": ["after"]}, "after"),
    ],
    ids=str,
)
def test_formula(config, where):
    model, t = residual(**{"target_modules": ["lin0"], **config})
    base, x = models.fill(example.Residual()).double(), X.double()
    c = model.peft_config["default"]
    f, s = c.non_linearity, c.scaling if isinstance(c.scaling, float) else None
    u = base.before(x)
    h = base.lin0(u)
    if where in ("output", "sum"):
        h = added(t, "lin0", h, f, s, h) if where == "sum" else h + added(t, "lin0", h, f, s)
    if where in ("input", "stream", "both"):
        h = h + added(t, "lin0", {"input": u, "stream": x, "both": x + h}[where], f, s)
    y = x + h
    if where == "renorm":
        y = y + added(t, "after", base.after(y), f, s)
    y = base.after(y)
    if where == "after":
        y = y + added(t, "after", y, f, s)
    assert gap(model(X), base.lin1(y)) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"phm_rank": 0, "phm_rule_rank": 1, "phm_shared_rule": False}], ids=str)
def test_hypercomplex_formula(options):
    model, t = residual(target_modules=["lin0"], variant="compacter", phm_dim=2, non_linearity="tanh", **options)
    t = {k.removeprefix("base_model."): v for k, v in t.items()}
    weights = {}
    for side in ("down", "up"):
        rule = f"lin0.bottleneck_{side}_rule" if options else "bottleneck_rule"
        rules = t.get(f"{rule}.weight") if not options else t[f"{rule}.left"] @ t[f"{rule}.right"]
        terms = t.get(f"lin0.bottleneck_{side}.weight")
        if terms is None:
            terms = t[f"lin0.bottleneck_{side}.left"] @ t[f"lin0.bottleneck_{side}.right"]
        weights[side] = sum(torch.kron(a, b) for a, b in zip(rules, terms))
    base, x = models.fill(example.Residual()).double(), X.double()
    h = base.lin0(base.before(x))
    h = (
        h
        + torch.tanh(h @ weights["down"] + t["lin0.bottleneck_down_bias"]) @ weights["up"]
        + t["lin0.bottleneck_up_bias"]
    )
    assert gap(model(X), base.lin1(base.after(x + h))) < 2e-6


def test_compacter_shares_its_rules_and_little_else():
    _, t = residual(target_modules=["lin0", "after"], variant="compacter", phm_dim=4)
    n, size, width = 4, 4, models.WIDTH
    per_layer = n * (width // n + size // n) * 2 + size + width
    assert sum(v.numel() for v in t.values()) == n**3 + 2 * per_layer
    assert [k for k in t if "rule" in k] == ["base_model.bottleneck_rule.weight"]


# -- places ----------------------------------------------------------------------------------------------------------
def skeleton(model_type):
    """A two-layer model of a type, without memory."""
    from transformers import AutoConfig, AutoModel

    layers = ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers"]
    layers += ["encoder_layers", "decoder_layers"]
    more = {"attention_types": [[["global"], 2]]} if model_type == "gpt_neo" else {}
    known = AutoConfig.for_model(model_type)
    sizes = {name: 2 for name in layers if hasattr(known, name)}
    if model_type in ("bart", "whisper"):
        sizes.pop("num_hidden_layers", None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModel.from_config(AutoConfig.for_model(model_type, **{**sizes, **more}))


@pytest.mark.parametrize("model_type", sorted(BOTTLENECK_SITES))
def test_default_places(model_type):
    stacks = 2 if model_type in ("t5", "mt5", "bart", "whisper") else 1
    base = skeleton(model_type)
    for variant, number in (("houlsby", 2), ("pfeiffer", 1), ("parallel", 1), ("compacter", 2), ("compacter++", 1)):
        model = get_peft_model(copy.deepcopy(base), BottleneckConfig(variant=variant))
        layers = model.base_model.layers.values()
        taps = [layer for layer in layers if layer.adapters["default"].bottleneck_feeds]
        assert len(layers) - len(taps) == 2 * number * stacks
        assert len(taps) in (0, 2 * stacks)
        assert all(layer.adapters["default"].bottleneck_size for layer in layers if layer not in taps)
    if BOTTLENECK_SITES[model_type]["embedding"]:
        model = get_peft_model(base, BottleneckConfig(invertible="nice"))
        assert sum("coupling" in n for n, _ in model.named_parameters()) == 8


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert_classifier", "gpt2", "t5"])
@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer", "parallel", "compacter"])
def test_works_without_further_settings(name, variant, tmp_path):
    config = BottleneckConfig(variant=variant, reduction_factor=4, phm_dim=4 if variant == "compacter" else None)
    model = get_peft_model(models.build(name), config).eval()
    assert torch.equal(models.run(model, name), models.run(models.build(name), name))
    train_a_little(model)
    y = models.run(model, name)
    assert gap(y, models.run(models.build(name), name)) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(models.run(peft.PeftModel.from_pretrained(models.build(name), tmp_path), name), y)


@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform(layers, tmp_path):
    model = get_peft_model(models.llama(), BottleneckConfig(reduction_factor=4, layers_to_transform=layers))
    assert list(model.base_model.layers) == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    model.save_pretrained(tmp_path)
    assert len(peft.PeftModel.from_pretrained(models.llama(), tmp_path).base_model.layers) == 2


def test_sizes():
    config = BottleneckConfig(bottleneck_size=3, size_pattern={r"layers\.0\.mlp.*": 5})
    model = get_peft_model(models.llama(), config)
    sizes = [layer.adapters["default"].bottleneck_size for layer in model.base_model.layers.values()]
    assert sizes == [3, 5, 3, 3]
    half = BottleneckConfig(reduction_factor=0.5, target_modules=["lin0"])
    assert get_peft_model(models.build("mlp"), half).base_model.layers["lin0"].adapters["default"].bottleneck_size == 48


WRONG = [
    ({"reduction_factor": 0.0}, "reduction_factor"),
    ({"bottleneck_size": 0}, "bottleneck_size"),
    ({"size_pattern": {"a": 0}}, "size_pattern"),
    ({"non_linearity": "softmax"}, "non_linearity"),
    ({"scaling": float("nan")}, "scaling"),
    ({"scaling": "trained"}, "scaling"),
    ({"variant": "bottle"}, "variant"),
    ({"dropout": 1.5}, "dropout"),
    ({"drop_first": -1}, "drop_first"),
    ({"reads": "both"}, "tap_modules"),
    ({"tap_modules": {"a": "b"}}, "tap_modules"),
    ({"renorm": True, "variant": "parallel"}, "renorm"),
    ({"residual_before_norm": True}, "residual_before_norm"),
    ({"invertible_head": ["lm_head"]}, "invertible_head"),
]


@pytest.mark.parametrize(("config", "says"), WRONG, ids=str)
def test_wrong_configs_are_named(config, says):
    with pytest.raises(ConfigError, match=says):
        BottleneckConfig(**config)


UNFIT = [
    ({}, "target_modules"),
    ({"target_modules": ["lin0"], "variant": "compacter", "bottleneck_size": 3}, "phm_dim"),
    ({"target_modules": ["lin0"], "variant": "parallel", "tap_modules": {"lin0": "nothing"}}, "nothing"),
    ({"target_modules": ["lin0"], "invertible": "nice"}, "invertible_modules"),
    ({"target_modules": ["lin0"], "invertible": "nice", "invertible_modules": ["lin1"]}, "width of 5"),
    (
        {"target_modules": ["lin0"], "invertible": "nice", "invertible_modules": ["lin0"]},
        "cannot have a bottleneck and",
    ),
    ({"target_modules": ["lin0"], "invertible": "nice", "invertible_modules": ["none"]}, "must name one module"),
    (
        {"target_modules": ["lin0", "lin1"], "variant": "compacter", "phm_shared_weights": True},
        "phm_shared_weights",
    ),
]


@pytest.mark.parametrize(("config", "says"), UNFIT, ids=str)
def test_configs_that_do_not_fit_leave_no_trace(config, says):
    base = example.Residual()
    before = [(n, type(m)) for n, m in base.named_modules()]
    with pytest.raises(ConfigError, match=says):
        get_peft_model(base, BottleneckConfig(**config))
    assert [(n, type(m)) for n, m in base.named_modules()] == before


def test_width_that_is_not_the_modules():
    base = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Sequential(torch.nn.Tanh()))
    with pytest.raises(ConfigError, match="hidden_size"):
        get_peft_model(copy.deepcopy(base), BottleneckConfig(target_modules=["1"]))
    model = get_peft_model(copy.deepcopy(base), BottleneckConfig(target_modules=["1"], hidden_size=6))
    assert model(torch.ones(2, 4)).shape == (2, 6)
    model = get_peft_model(base, BottleneckConfig(target_modules=["1"], hidden_size=5))
    with pytest.raises(AdapterError, match="was made for 5 features, but gets 6"):
        model(torch.ones(2, 4))


# -- taps ------------------------------------------------------------------------------------------------------------
STREAM = {"mlp.down_proj": "post_attention_layernorm"}
TAPPED = {
    "variant": "scaled_parallel",
    "reduction_factor": 4,
    "target_modules": ["mlp.down_proj"],
    "tap_modules": STREAM,
}


def tapped():
    """A Llama with an adapter that reads the residual stream, twice."""
    torch.manual_seed(0)
    model = get_peft_model(models.llama(), BottleneckConfig(**TAPPED, task_type="CAUSAL_LM"))
    model.add_adapter("second", BottleneckConfig(**TAPPED, task_type="CAUSAL_LM"))
    train_a_little(model)
    train_a_little(model, "second", 5000)
    return model


def test_taps_go_with_their_adapters():
    model = tapped().eval()
    assert set(model.base_model.layers) == {f"model.layers.{i}.{n}" for i in (0, 1) for n in next(iter(STREAM.items()))}
    first = models.run(model, "llama")
    assert not model.base_model.state.handed
    model.delete_adapter("default")
    model.delete_adapter("second")
    assert not model.base_model.layers
    assert gap(models.run(model, "llama"), first) > 1e-3


def test_nothing_that_was_tapped_is_kept():
    """Not where the adapter rests in this step, nor where one tap's name fits parts that have no adapter."""
    config = BottleneckConfig(**TAPPED, drop_first=2, task_type="CAUSAL_LM")
    model = get_peft_model(models.llama(), config).train()
    for _ in range(8):
        model(input_ids=models.inputs("llama")["input_ids"])
        assert not model.base_model.state.handed
    parts = {f"{part}.{name}": "layer_norm" for part, name in (("SelfAttention", "o"), ("DenseReluDense", "wo"))}
    config = BottleneckConfig(variant="parallel", reduction_factor=4, target_modules=list(parts), tap_modules=parts)
    model = get_peft_model(models.t5(), config)
    models.run(model, "t5")
    assert not model.base_model.state.handed and len(model.base_model.layers) == 16


@pytest.mark.parametrize("reentrant", [True, False])
def test_taps_under_gradient_checkpointing(reentrant):
    found = []
    for checkpoint in (False, True):
        model = tapped().train()
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = models.inputs("llama")["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 10
    for name, grad in found[0].items():
        assert gap(found[1][name], grad) < 1e-5, name


@torch.no_grad()
def test_taps_in_threads_that_run_different_adapters():
    model = tapped().eval()
    ids = models.inputs("llama")["input_ids"]
    wanted = {name: model(input_ids=ids, adapter_names=name).logits for name in ("default", "second")}
    wrong = []

    @torch.no_grad()
    def work(name):
        for _ in range(30):
            if not torch.equal(model(input_ids=ids, adapter_names=name).logits, wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and gap(wanted["default"], wanted["second"]) > 1e-3


def test_a_tap_that_comes_too_late_is_an_error():
    model, _ = residual(target_modules=["lin0"], reads="both", tap_modules={"lin0": "after"})
    with pytest.raises(AdapterError, match="did not run before it"):
        model(X)


# -- AdapterDrop -----------------------------------------------------------------------------------------------------
def test_adapter_drop_rests_the_first_layers():
    config = BottleneckConfig(reduction_factor=4, drop_first=2, task_type="CAUSAL_LM")
    model = get_peft_model(models.llama(), config)
    train_a_little(model)
    ids, seen = models.inputs("llama")["input_ids"], set()
    for seed in range(30):
        torch.manual_seed(seed)
        resting = int(torch.randint(0, 3, ()))
        torch.manual_seed(seed)
        model.train().zero_grad(set_to_none=True)
        y = model(input_ids=ids).logits
        if y.requires_grad:
            y.sum().backward()
        trained = {n.split(".layers.")[1][0] for n, p in model.named_parameters() if p.grad is not None}
        assert trained == {"0", "1"} - {str(i) for i in range(resting)}
        seen.add(resting)
    assert seen == {0, 1, 2}
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# -- invertible ------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("affine", [False, True])
def test_the_inverse_is_the_inverse(affine):
    coupling = Coupling(8, 2, "relu", affine, dtype=torch.float64)
    for i, p in enumerate(coupling.parameters()):
        p.copy_(noise(p.shape, i))
    x = noise((3, 5, 8), 9).double()
    assert gap(coupling(x), x) > 0.1
    torch.testing.assert_close(coupling.inverse(coupling(x)), x)
    a, b = x.chunk(2, -1)
    if not affine:  # NICE: each half moves by a function of the other
        relu = lambda h, down, up: F.linear(torch.relu(F.linear(h, down.weight, down.bias)), up.weight, up.bias)  # noqa: E731
        a = a + relu(b, coupling.first_down, coupling.first_up)
        b = b + relu(a, coupling.second_down, coupling.second_up)
        torch.testing.assert_close(coupling(x), torch.cat([a, b], -1))


@torch.no_grad()
def test_the_output_embedding_sees_the_inverse(tmp_path):
    options = {"invertible": "glow", "invertible_head": ["lm_head"], "reduction_factor": 4, "task_type": "CAUSAL_LM"}
    model = get_peft_model(models.llama(), BottleneckConfig(**options)).eval()
    train_a_little(model)
    seen = {}
    head = model.base_model.model.lm_head
    head.register_forward_pre_hook(lambda m, args: seen.update(outer=args[0]))
    head.base_layer.register_forward_pre_hook(lambda m, args: seen.update(inner=args[0]))
    y = models.run(model, "llama")
    coupling = model.base_model.model.model.embed_tokens.bottleneck_coupling["default"]
    torch.testing.assert_close(seen["inner"], coupling.inverse(seen["outer"]))
    assert gap(seen["inner"], seen["outer"]) > 1e-3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    assert torch.equal(models.run(again, "llama"), y)
    twin = copy.deepcopy(model)
    train_a_little(twin, seed=77)
    assert (
        twin.base_model.model.lm_head.bottleneck_coupling
        is twin.base_model.model.model.embed_tokens.bottleneck_coupling
    )
    assert torch.equal(models.run(model, "llama"), y)


# -- beside other methods --------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
def test_with_lora_in_one_mixed_model(variant):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    models_by_method = {}
    for method, config in (("bottleneck", BottleneckConfig(variant=variant, reduction_factor=4)), ("lora", lora)):
        torch.manual_seed(1)
        models_by_method[method] = get_peft_model(models.llama(), copy.deepcopy(config)).eval()
    train_a_little(models_by_method["bottleneck"])
    torch.manual_seed(1)
    model = get_peft_model(models.llama(), copy.deepcopy(lora), "lora", mixed=True).eval()
    model.add_adapter("bottleneck", BottleneckConfig(variant=variant, reduction_factor=4))
    own = peft.get_peft_model_state_dict(models_by_method["bottleneck"])
    for key, value in own.items():
        path, _, field = key.removeprefix("base_model.model.").rpartition(".bottleneck_")
        layer = next(a for a in model.base_model.adapters_called("bottleneck") if a.key == path)
        name, _, entry = field.partition(".")
        getattr(getattr(layer, f"bottleneck_{name}"), entry).copy_(value)
    for method, alone in models_by_method.items():
        model.set_adapter(method)
        assert gap(models.run(model, "llama"), models.run(alone, "llama")) < 2e-6
    model.set_adapter(["lora", "bottleneck"])
    both = models.run(model, "llama")
    model.add_adapter("third", LoraConfig(r=2, target_modules=["o_proj"]))
    assert torch.equal(models.run(model, "llama"), both)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()


@torch.no_grad()
def test_around_a_model_that_has_lora():
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = peft.inject_adapter_in_model(lora, models.llama()).eval()
    plain = models.run(base, "llama")
    model = get_peft_model(base, BottleneckConfig(reduction_factor=4, variant="pfeiffer"), "bottleneck").eval()
    model.base_model.set_adapter(["default", "bottleneck"])
    assert torch.equal(models.run(model, "llama"), plain)
    train_a_little(model, "bottleneck")
    both = models.run(model, "llama")
    assert gap(both, plain) > 1e-3
    model.base_model.set_adapter(["bottleneck"])
    assert gap(models.run(model, "llama"), both) > 1e-3


def test_a_hostile_size_is_refused(tmp_path):
    model, _ = residual(target_modules=["lin0"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"bottleneck_size": 4', '"bottleneck_size": 1000000000'))
    with pytest.raises(CheckpointError):
        peft.PeftModel.from_pretrained(models.fill(example.Residual()), tmp_path)
