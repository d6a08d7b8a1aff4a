"""What the laws do not say of LoRA's variants: their settings, losses, random draws, and the gradients of VeLoRA."""

from __future__ import annotations

import itertools
import math

import models
import pytest
import torch
from torch import nn

import peft
from peft import quant
from peft.helpers import MontecloraTrainerMixin
from peft.methods.lora.qalora import QaLora
from peft.ops import lowrank
from peft.quant.backend import Plain

SETTINGS = {
    "arrow_config": (peft.ArrowConfig, {"top_k": 2, "task_adapter_names": ["a"]}),
    "kasa_config": (peft.KasaConfig, {"beta": 0.5}),
    "monteclora_config": (peft.MontecloraConfig, {"num_samples": 3}),
    "use_bdlora": (peft.BdLoraConfig, {"nblocks": 2, "target_modules_bd_a": ["q"]}),
    "velora_config": (peft.VeloraConfig, {"num_groups": 4}),
}
X = models.noise((6, models.WIDTH), 7)


def layer_with(inp=16, out=12, training=True, dtype=torch.float32, bias=True, **config):
    """One linear layer with an adapter whose values are all noise, and the adapter."""
    torch.manual_seed(0)
    net = models.fill(nn.Sequential(nn.Linear(inp, out, bias=bias))).to(dtype)
    model = peft.get_peft_model(net, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], **config}))
    layer = model.base_model.layers["0"]
    with torch.no_grad():
        for i, p in enumerate(layer.adapters["default"].parameters()):
            p.copy_(models.noise(p.shape, 20 + i) * 0.5)
    return model.train(training), layer, layer.adapters["default"]


# -- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", SETTINGS)
def test_settings_become_objects_and_travel(field, tmp_path):
    cls, given = SETTINGS[field]
    config = peft.LoraConfig(**{field: given})
    assert getattr(config, field) == cls(**given) and isinstance(getattr(config, field), cls)
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert again == config and isinstance(getattr(again, field), cls)
    assert getattr(peft.LoraConfig(**{field: cls(**given)}), field) == cls(**given)
    assert isinstance(getattr(peft.LoraConfig(**{field: {}}), field), cls)
    assert getattr(peft.LoraConfig(), field) is None


@pytest.mark.parametrize("field", SETTINGS)
def test_settings_that_are_none_are_refused(field):
    name = SETTINGS[field][0].__name__
    for wrong in ({"no_such": 1}, True, "x", peft.LoraConfig()):
        with pytest.raises(ValueError, match=f"LoraConfig.{field} must be a {name}"):
            peft.LoraConfig(**{field: wrong})


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("kasa_config", {"beta": -1.0}),
        ("kasa_config", {"gamma": float("nan")}),
        ("monteclora_config", {"num_samples": 0}),
        ("monteclora_config", {"dirichlet_prior": 0.0}),
        ("monteclora_config", {"buffer_size": 0}),
        ("monteclora_config", {"sample_scaler": float("inf")}),
        ("use_bdlora", {"nblocks": 0}),
        ("velora_config", {"num_groups": 0}),
        ("velora_config", {"scale": 0.0}),
        ("velora_config", {"init_type": "mean"}),
    ],
)
def test_wrong_values_name_their_field(field, settings):
    with pytest.raises(ValueError, match=rf"Config\.{next(iter(settings))} must be"):
        peft.LoraConfig(**{field: settings})


def test_two_variants_exclude_each_other():
    fields = {**{f: given for f, (_, given) in SETTINGS.items()}, "use_dora": True, "use_qalora": True}
    fields["alora_invocation_tokens"] = [1]
    for first in fields:
        for second in fields:
            if first != second:
                with pytest.raises(ValueError, match="exclude each other") as error:
                    peft.LoraConfig(**{first: fields[first], second: fields[second]})
                assert first in str(error.value) and second in str(error.value)


@pytest.mark.parametrize("field", [f for f in SETTINGS if f != "arrow_config"])
@pytest.mark.parametrize("kind", ["embedding", "conv", "mha", "param"])
def test_layers_other_than_linear_are_refused_without_a_trace(field, kind):
    base, target = {
        "embedding": ("embedded", {"target_modules": ["emb"]}),
        "conv": ("convs", {"target_modules": ["conv2"]}),
        "mha": ("attention", {"target_modules": ["mha"]}),
        "param": ("parameters", {"target_modules": [], "target_parameters": ["matrix.weight"]}),
    }[kind]
    model = models.build(base)
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match="adapts layers of the kinds linear"):
        peft.get_peft_model(model, peft.LoraConfig(**{field: SETTINGS[field][1]}, **target))
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    plain = peft.get_peft_model(model, peft.LoraConfig(**target))
    names = [n for n, _ in plain.named_parameters()]
    with pytest.raises(ValueError, match=r"kinds linear|KaSA"):
        plain.add_adapter("variant", peft.LoraConfig(**{field: SETTINGS[field][1]}, **target))
    assert [n for n, _ in plain.named_parameters()] == names


@torch.no_grad()
def test_variants_live_beside_each_other_on_one_layer():
    chosen = {
        "plain": {},
        "dora": {"use_dora": True},
        "velora": {"velora_config": {"num_groups": 4}},
        "blocks": {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["lin"]}},
        "monte": {"monteclora_config": {}},
    }
    model, alone = peft.get_peft_model(models.build("mlp"), peft.LoraConfig(target_modules=["lin0"])).eval(), {}
    for i, (name, variant) in enumerate(chosen.items()):
        model.add_adapter(name, peft.LoraConfig(r=4, target_modules=["lin0"], **variant))
        for j, p in enumerate(model.base_model.layers["lin0"].adapters[name].parameters()):
            p.copy_(models.noise(p.shape, 10 * i + j))
        model.set_adapter(name)
        alone[name] = model(X)
    names = [*chosen, "blocks"]
    mixed = model(X, adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=1e-5, rtol=1e-5)
    for name in chosen:
        model.delete_adapter(name)
    assert {n for n, _ in model.named_parameters() if "lora_" in n} == {
        f"base_model.model.lin0.lora_{x}.default.weight" for x in "AB"
    }
    assert not list(model.named_buffers())


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
@torch.no_grad()
def test_combinations_are_plain_lora(how):
    model = peft.get_peft_model(models.build("mlp"), peft.LoraConfig(r=4, target_modules=["lin0"]))
    blocks = {"nblocks": 2, "target_modules_bd_a": ["lin"]}
    model.add_adapter("blocks", peft.LoraConfig(r=4, target_modules=["lin0"], use_bdlora=blocks))
    layer = model.eval().base_model.layers["lin0"]
    for name in ("default", "blocks"):
        for j, p in enumerate(layer.adapters[name].parameters()):
            p.copy_(models.noise(p.shape, j))
    model.add_weighted_adapter(["blocks", "default"], [0.5, 0.25], "both", how, svd_rank=8)
    assert model.peft_config["both"].use_bdlora is None and layer.lora_A["both"].weight.shape[1] == models.WIDTH
    if how != "linear":
        wanted = 0.5 * layer.get_delta_weight("blocks") + 0.25 * layer.get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("both"), wanted, atol=1e-5, rtol=1e-5)


# -- KaSA ------------------------------------------------------------------------------------------------------------
def test_kasa_takes_the_smallest_components_away_while_it_acts():
    _model, layer, a = layer_with(kasa_config={}, bias=False)
    W = layer.base_layer.weight.detach()
    assert torch.equal(W, models.fill(nn.Sequential(nn.Linear(16, 12, bias=False)))[0].weight)
    with torch.no_grad():
        a.lora_B.weight.zero_()
        S = torch.linalg.svdvals(W)
        left = torch.linalg.svdvals(layer(torch.eye(16)).T)
        torch.testing.assert_close(left[:8], S[:8])
        assert left[8:].abs().max() < 1e-5 < 1e-2 < S[8:].min()


@torch.no_grad()
def test_kasa_adapters_of_a_model_do_not_touch_each_other():
    """Upstream truncates the base again for each new adapter, which changes what the earlier ones compute."""
    model, layer, _ = layer_with(kasa_config={}, training=False)
    before = model(X)
    model.add_adapter("larger", peft.LoraConfig(r=8, target_modules=["0"], kasa_config={}))
    assert torch.equal(model(X), before)
    layer.lora_B["larger"].weight.copy_(models.noise((12, 8), 3))
    model.base_model.set_adapter(["default", "larger"])
    s, d = layer.scaling["larger"], layer.lora_diag["larger"]
    more = s * (X @ layer.lora_A["larger"].weight.T * d) @ layer.lora_B["larger"].weight.T
    torch.testing.assert_close(model(X), before + more, atol=1e-5, rtol=1e-5)


def test_kasa_dropout_leaves_the_rest_of_the_weight_alone():
    model, _layer, a = layer_with(kasa_config={}, lora_dropout=0.5)
    with torch.no_grad():
        a.lora_B.weight.zero_()
        assert torch.equal(model(X), model(X))
        torch.testing.assert_close(model(X), model.eval()(X))


@torch.no_grad()
def test_kasa_scaling_scales_the_replacement_alone():
    model, layer, _a = layer_with(kasa_config={}, training=False)
    full = model(X)
    layer.set_scale("default", 0.0)
    none = model(X)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(model(X), (full + none) / 2, atol=1e-5, rtol=1e-5)


def test_kasa_loss():
    """Its number, and that of two layers, is upstream's, measured."""
    model, _layer, a = layer_with(kasa_config={"beta": 0.5, "gamma": 0.25})
    A, B, d, eye = a.lora_A.weight, a.lora_B.weight, a.lora_diag, torch.eye(4)
    wanted = 0.5 * (d**2).sum() + 0.25 * (torch.dist(A @ A.T, eye) + torch.dist(B.T @ B, eye))
    loss = model.base_model._get_kasa_loss()
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (A, B, d))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"], kasa_config={}))
    assert torch.equal(model.base_model._get_kasa_loss(), loss)
    both = model.base_model._get_kasa_loss(["default", "second"])
    torch.testing.assert_close(both, loss + model.base_model._get_kasa_loss("second"))
    plain = peft.get_peft_model(models.build("mlp"), peft.LoraConfig(target_modules=["lin0"]))
    assert plain.base_model._get_kasa_loss() == 0.0


@pytest.mark.parametrize("first", [True, False])
def test_kasa_and_others_are_not_on_one_model(first):
    configs = [peft.LoraConfig(target_modules=["lin0"], r=4, kasa_config=k) for k in ({}, None)]
    model = peft.get_peft_model(models.build("mlp"), configs[0 if first else 1])
    with pytest.raises(ValueError, match="KaSA adapters"):
        model.add_adapter("other", configs[1 if first else 0])
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"r": 5}, "r=5 must be smaller"), ({"r": 4, "init_lora_weights": "pissa"}, "use only one")],
)
def test_what_kasa_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(models.build("mlp"), peft.LoraConfig(target_modules=["lin1"], kasa_config={}, **changes))


def test_kasa_is_no_lora_to_convert_to():
    model, _, _ = layer_with(kasa_config={})
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, 4)


# -- VeLoRA ----------------------------------------------------------------------------------------------------------
def compressed_gradient(x, A, B, g, s, size, scale=1.0):
    """The gradient of A where each group of inputs is replaced by its part along the groups' mean."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % size))
    groups = padded.reshape(-1, size)
    v = groups.mean(0) / groups.mean(0).norm()
    rebuilt = ((groups @ v)[:, None] * v * scale).reshape(len(padded), -1)[:, : x.shape[-1]]
    return v, s * (g @ B).T @ rebuilt


@pytest.mark.parametrize(("groups", "size", "scale"), [(4, 4, 1.0), (5, 4, 2.0), (1, 16, 1.0), (64, 1, 1.0)])
def test_velora_gradients(groups, size, scale):
    model, layer, a = layer_with(velora_config={"num_groups": groups, "scale": scale})
    x = X.clone().requires_grad_()
    y = model(x)
    g = models.noise(y.shape, 4)
    y.backward(g)
    A, B, s, W = a.lora_A.weight, a.lora_B.weight, 1.5, layer.base_layer.weight
    with torch.no_grad():
        v, dA = compressed_gradient(X, A, B, g, s, size, scale)
        torch.testing.assert_close(a.lora_velora_embed, v)
        torch.testing.assert_close(A.grad, dA, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(B.grad, s * g.T @ (X @ A.T), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x.grad, g @ W + s * g @ B @ A, atol=1e-5, rtol=1e-5)
        model.eval()
        torch.testing.assert_close(model(X), y, atol=1e-5, rtol=1e-5)


def test_velora_is_lora_outside_training():
    model, _layer, a = layer_with(velora_config={"num_groups": 4}, training=False)
    model(X).sum().backward()
    exact = 1.5 * (torch.ones(6, 12) @ a.lora_B.weight).T @ X
    torch.testing.assert_close(a.lora_A.weight.grad, exact, atol=1e-5, rtol=1e-5)
    assert not a.lora_velora_embed.any()
    with torch.no_grad():
        model.train()(X)
    assert not a.lora_velora_embed.any()


def test_velora_keeps_less_for_the_backward_pass():
    kept = {}
    for name, config in {"lora": {}, "velora": {"velora_config": {"num_groups": 16}}}.items():
        model, _, _ = layer_with(inp=256, **config)
        seen = {}
        x = models.noise((64, 256), 7)

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        weights = {t.untyped_storage().data_ptr() for t in model.parameters()}
        kept[name] = sum(size for at, size in seen.items() if at not in weights)
        y.sum().backward()
    assert kept["velora"] < kept["lora"] / 5


@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
def test_when_velora_chooses_its_direction(init_type, tmp_path):
    model, _layer, a = layer_with(velora_config={"num_groups": 4, "init_type": init_type})
    seen = [a.lora_velora_embed.clone()]
    for seed in (1, 2):
        model(models.noise((6, 16), seed))
        seen.append(a.lora_velora_embed.clone())
    same = {"batch_average": [False, False], "batch_average_once": [False, True], "random": [True, True]}
    assert [torch.equal(p, q) for p, q in itertools.pairwise(seen)] == same[init_type]
    assert all(abs(v.norm() - 1) < 1e-5 for v in seen[1:])
    model.save_pretrained(tmp_path)
    base = models.fill(nn.Sequential(nn.Linear(16, 12)))
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    embed = again.base_model.layers["0"].lora_velora_embed["default"]
    assert torch.equal(embed, seen[-1])
    again(models.noise((6, 16), 3))  # upstream chooses a new one after loading, once or not
    embed = again.base_model.layers["0"].lora_velora_embed["default"]
    assert torch.equal(embed, seen[-1]) == (init_type != "batch_average")


def test_velora_of_zeros_and_of_two_forwards_before_a_backward():
    model, _layer, a = layer_with(velora_config={"num_groups": 4})
    first = model(torch.zeros(3, 16))
    torch.testing.assert_close(a.lora_velora_embed, torch.full((4,), 0.5))
    second = model(X)
    (first.sum() + second.sum()).backward()  # each has its own direction
    with torch.no_grad():
        _, dA = compressed_gradient(X, a.lora_A.weight, a.lora_B.weight, torch.ones(6, 12), 1.5, 4)
        torch.testing.assert_close(a.lora_A.weight.grad, dA, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_velora_in_half_precision(autocast):
    model, layer, a = layer_with(velora_config={"num_groups": 4}, dtype=torch.float32 if autocast else torch.bfloat16)
    x = X.to(layer.base_layer.weight.dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16 and x.grad.dtype is x.dtype
    exact = layer_with(velora_config={"num_groups": 4})[0]
    exact(X).sum().backward()
    wanted = exact.base_model.layers["0"].lora_A["default"].weight.grad
    assert (a.lora_A.weight.grad - wanted).abs().max() < 0.05 * wanted.abs().max()


# -- MonteCLoRA ------------------------------------------------------------------------------------------------------
def monte(**settings):
    model, layer, a = layer_with(monteclora_config={"num_samples": 3, **settings})
    return model, layer, a, a.lora_monteclora_sampler


@torch.no_grad()
def test_monteclora_draws_in_training_alone():
    model, layer, a, _ = monte(sample_scaler=0.5)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))
    plain = layer.base_layer(X) + 1.5 * X @ a.lora_A.weight.T @ a.lora_B.weight.T
    torch.testing.assert_close(model(X), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_monteclora_noise_has_the_distribution_of_the_formula():
    """Against sampling all Gaussians and a whole Wishart matrix, as the paper has it."""
    torch.manual_seed(1)
    _model, _layer, a, sampler = monte(sample_scaler=0.7)
    std, alpha, n, times = sampler.std_prior.exp(), sampler.expert_weights_prior.exp(), 3, 4000
    ours = torch.stack([a.low_rank().A - a.lora_A.weight for _ in range(times)])
    wishart = torch.distributions.Wishart(4, torch.eye(4)).sample((times,))
    v = (std.square() * wishart.diagonal(dim1=1, dim2=2)).clamp(min=1e-3)
    spread = (1 / alpha * (1 - 2 / n) + (1 / alpha).sum() / n**2).sqrt()
    weights = torch.softmax(alpha.log() - alpha.log().mean() + spread * torch.randn(times, n), -1)
    theirs = 0.7 * torch.einsum("te,teri,tr->tri", weights, torch.randn(times, n, 4, 16), v.sqrt())
    assert ours.mean().abs() < 0.02
    for power in (2, 4):  # of each row: its variance differs from the others'
        a_moment, b_moment = ours.pow(power).mean((0, 2)), theirs.pow(power).mean((0, 2))
        torch.testing.assert_close(a_moment, b_moment, atol=0, rtol=0.1 * power)
    pair = [(t[:, 0, 0] * t[:, 0, 1]).pow(2).mean() / t[:, 0].pow(4).mean() for t in (ours, theirs)]
    assert abs(pair[0] - pair[1]) < 0.06  # entries of a row share their variance
    assert (ours[:, 0].flatten() * ours[:, 1].flatten()).mean().abs() < 0.02


def test_monteclora_gradients_are_those_of_what_was_drawn():
    model, _layer, a, sampler = monte(sample_scaler=0.5)

    def loss():
        torch.manual_seed(5)
        return model.double()(X.double()).sin().sum()

    loss().backward()
    for p in (sampler.std_prior, sampler.expert_weights_prior, a.lora_A.weight):
        direction = models.noise(p.shape, 8).double()
        with torch.no_grad():
            p.add_(direction, alpha=1e-6)
            above = loss()
            p.sub_(direction, alpha=2e-6)
            below = loss()
            p.add_(direction, alpha=1e-6)
        wanted = float((p.grad * direction).sum())
        assert abs(float(above - below) / 2e-6 - wanted) < 1e-5 * max(1.0, abs(wanted))


def test_monteclora_loss_is_the_divergence():
    model, _layer, _a, sampler = monte(kl_loss_weight=1.0, dirichlet_prior=0.3)
    model(X)
    v, r, n = sampler.gaussian_var_prior.diag(), 4, 3
    dirichlets = [torch.distributions.Dirichlet(t) for t in (sampler.expert_weights_prior.exp(), torch.full((3,), 0.3))]
    wanted = torch.distributions.kl_divergence(*dirichlets)
    var = (2 * sampler.std_prior).exp()
    wanted = wanted + 0.5 * (r * var.sum() - r * var.log().sum() - r * r)
    wanted = wanted + 0.5 * n * (v.sum() - v.log().sum() - r)
    loss = model.base_model._get_monteclora_loss()
    torch.testing.assert_close(loss, wanted)
    assert loss > 0
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (sampler.std_prior, sampler.expert_weights_prior))
    assert model.eval().base_model._get_monteclora_loss() == 0.0
    with_entropy = monte(kl_loss_weight=0.0, use_entropy=True)
    with_entropy[0](X)
    torch.testing.assert_close(
        with_entropy[0].base_model._get_monteclora_loss(), with_entropy[3].expert_weights.square().sum()
    )
    model, _, _, sampler = monte(num_samples=64)  # where upstream's is infinite
    model(X)
    assert math.isfinite(model.base_model._get_monteclora_loss())


def test_monteclora_loss_is_a_mean_over_layers():
    config = peft.LoraConfig(r=4, target_modules=["lin0", "lin1"], monteclora_config={"kl_loss_weight": 1.0})
    model = peft.get_peft_model(models.build("mlp"), config).train()
    model(X)
    parts = [layer.adapters["default"].penalty() for layer in model.base_model.layers.values()]
    torch.testing.assert_close(model.base_model._get_monteclora_loss(), sum(parts) / 2)
    plain = peft.get_peft_model(models.build("mlp"), peft.LoraConfig(target_modules=["lin0"]))
    assert plain.base_model._get_monteclora_loss("default") == 0.0


def test_monteclora_trainer_adds_its_loss():
    class Base:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            y = model(inputs["x"])
            return (y.sum(), y) if return_outputs else y.sum()

    class Trainer(MontecloraTrainerMixin, Base):
        pass

    model, _, _, _ = monte(kl_loss_weight=1.0)
    model.eval()
    task = model(X).sum()
    assert torch.equal(Trainer().compute_loss(model, {"x": X}), task)
    model.train()
    torch.manual_seed(2)
    task = model(X).sum()
    torch.manual_seed(2)
    total, outputs = Trainer().compute_loss(model, {"x": X}, return_outputs=True, num_items_in_batch=3)
    torch.testing.assert_close(total, task + model.base_model._get_monteclora_loss())
    torch.testing.assert_close(outputs.sum(), task)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_monteclora_under_checkpointing(reentrant):
    """A recomputed forward draws the same numbers; upstream takes the next ones of its buffer."""

    def step(checkpointing):
        torch.manual_seed(0)
        settings = {"monteclora_config": {"sample_scaler": 0.5}, "init_lora_weights": False}
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)
        model = peft.get_peft_model(models.llama(), config).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        ids = models.inputs("llama")["input_ids"]
        (model(input_ids=ids, labels=ids, use_cache=False).loss + model.base_model._get_monteclora_loss()).backward()
        return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}

    wanted, found = step(False), step(True)
    assert len(wanted) == 8
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, atol=1e-6, rtol=1e-4, msg=name)


# -- BD-LoRA ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nblocks": 3, "target_modules_bd_a": ["lin"]}, "must divide r=4"),
        ({"nblocks": 4, "target_modules_bd_b": ["lin1"], "match_strict": False}, "the width 5 of lin1"),
        ({"target_modules_bd_a": ["lin0"]}, "matches the target lin1"),
        ({"target_modules_bd_a": ["lin0"], "target_modules_bd_b": ["lin"]}, "both match lin0"),
    ],
)
def test_blocks_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(
            models.build("mlp"), peft.LoraConfig(r=4, target_modules=["lin0", "lin1"], use_bdlora=settings)
        )


def test_bdlora_refuses_initialisations_of_whole_factors():
    with pytest.raises(ValueError, match="init_lora_weights='pissa' fills whole factors"):
        layer_with(use_bdlora={"target_modules_bd_a": ["0"]}, init_lora_weights="pissa")


@torch.no_grad()
def test_blocks_start_as_upstreams_do():
    """Uniform within √(6 / width of a block); B is zero."""
    settings = {"target_modules_bd_a": ["0"], "nblocks": 4}
    net = nn.Sequential(nn.Linear(1024, 64))
    model = peft.get_peft_model(net, peft.LoraConfig(r=32, target_modules=["0"], use_bdlora=settings))
    layer = model.base_model.layers["0"]
    A = layer.lora_A["default"].weight
    bound = math.sqrt(6 / 256)
    assert A.abs().max() <= bound and abs(float(A.std()) - bound / math.sqrt(3)) < 0.02 * bound
    assert not layer.lora_B["default"].weight.any()


# -- QA-LoRA ---------------------------------------------------------------------------------------------------------
def test_qalora_refuses_layers_that_are_not_quantized():
    """Upstream trains a plain LoRA there."""
    with pytest.raises(ValueError, match="quantized with GPTQ, and 0 is a plain Linear"):
        layer_with(use_qalora=True)


@torch.no_grad()
def test_qalora_reads_means_of_groups(monkeypatch):
    monkeypatch.setattr(QaLora, "storages", ("",))
    model, layer, a = layer_with(use_qalora=True, qalora_group_size=4, training=False)
    A, B = a.lora_A.weight, a.lora_B.weight
    assert A.shape == (4, 4)
    wanted = layer.base_layer(X) + 1.5 * (X.reshape(6, 4, 4).mean(-1) * 4) @ A.T @ B.T
    torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="qalora_group_size=5 must divide the width 16 of 0"):
        layer_with(use_qalora=True, qalora_group_size=5)
    with pytest.raises(ValueError, match="fills an A of the full width"):
        layer_with(use_qalora=True, init_lora_weights="olora", qalora_group_size=4)


@torch.no_grad()
def test_qalora_changes_zero_points_only(monkeypatch):
    """The paper's point: on weights q·scale + zero with a zero for each group, a merge keeps every q and scale."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features, self.bias = 16, 12, None
            self.weight = nn.Parameter(torch.randint(0, 16, (12, 4, 4), dtype=torch.uint8), requires_grad=False)
            self.scale, self.zero = torch.rand(12, 4, 1) + 0.1, torch.randn(12, 4, 1)

        def forward(self, x):
            return x @ (self.weight * self.scale + self.zero).flatten(1).T

    class Backend(Plain):
        name = "gptq"

        @staticmethod
        def owns(base):
            return isinstance(base, Grouped)

        def get(self, base, param):
            return base.weight, base.zero

        def put(self, base, param, packed):
            _, base.zero = packed

        def unpack(self, base, packed):
            return (packed[0] * base.scale + packed[1]).flatten(1)

        def pack(self, base, W, old):
            return old[0], (W.view(12, 4, 4) - old[0] * base.scale).mean(2, keepdim=True)

        def placement(self, base, param):
            return base.scale.device, torch.float32

    monkeypatch.setattr(quant, "BACKENDS", [Backend])
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0"], r=4, use_qalora=True, qalora_group_size=4, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(Grouped()), config).eval()
    wanted = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(verify=True)
    assert merged.merge_report.error < 1e-5
    torch.testing.assert_close(merged(X), wanted, atol=1e-5, rtol=1e-5)


def test_qalora_trains_its_small_factor(monkeypatch):
    monkeypatch.setattr(QaLora, "storages", ("",))
    model, _layer, a = layer_with(use_qalora=True, qalora_group_size=4)
    model(X).sum().backward()
    wanted = 1.5 * (torch.ones(6, 12) @ a.lora_B.weight).T @ (X.reshape(6, 4, 4).mean(-1) * 4)
    torch.testing.assert_close(a.lora_A.weight.grad, wanted, atol=1e-5, rtol=1e-5)
    with lowrank.exact():
        torch.testing.assert_close(model(X), model.eval()(X))


def test_refuses_what_it_cannot_run():
    """Loaded as plain LoRA it would compute something else without a word."""
    for name in peft.LoraConfig.NOT_HERE:
        with pytest.raises(ValueError, match=f"LoraConfig.{name} is not supported by this version"):
            peft.LoraConfig(**{name: {"x": 1}})
