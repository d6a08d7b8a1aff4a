"""Shadow on a diffusion transformer, Flux2 of diffusers: its laws, and what is special to it."""

from __future__ import annotations

import copy
import json
import pickle
import re
import threading

import models
import pytest
import torch
import torch.nn.functional as F
from laws_table import base_tensors, gap, quiet, same_tensors, train_a_little
from models import flux2, flux2_inputs
from safetensors.torch import load_file

import peft

diffusers = pytest.importorskip("diffusers")

LIST = "single_transformer_blocks"
SMALL = {"shadow_hidden_size": 8, "shadow_intermediate_size": 13}
OPTIONS = pytest.mark.parametrize("options", [{}, SMALL, {"share_embeddings": False}], ids=["shared", "small", "own"])


def config(**changes):
    """An adapter on all single-stream blocks, strong enough to see."""
    return peft.ShadowConfig(**{"r": 4, "shadow_alpha": 0.5, **changes})


def plain(**sizes):
    """The base model as it is beside an adapter: frozen, since PyTorch has another kernel for frozen norms."""
    return flux2(**sizes).requires_grad_(False)


@quiet
def wrapped(base=None, trained=True, **changes):
    """A model with an adapter, in eval mode."""
    torch.manual_seed(0)
    model = peft.get_peft_model(flux2() if base is None else base, config(**changes))
    if trained:
        train_a_little(model)
    return model.eval()


@quiet
def with_second(**changes):
    """A model with two adapters, the first of them active."""
    model = wrapped()
    model.add_adapter("second", config(**{"r": 2, "target_modules": [f"{LIST}.1"], **SMALL, **changes}))
    train_a_little(model, "second", 5000)
    return model.eval()


@torch.no_grad()
def sample(model, **call):
    """The model's output."""
    return model(**{**flux2_inputs(), **call}).sample


# -- values ------------------------------------------------------------------------------------------------------
@OPTIONS
def test_starts_as_the_base_bit_for_bit(options):
    model = wrapped(trained=False, **options)
    assert torch.equal(sample(model), sample(plain()))
    train_a_little(model)
    assert gap(sample(model), sample(plain())) > 1e-3
    assert gap(sample(wrapped(trained=False, init_weights=False, **options)), sample(plain())) > 1e-3


def test_disabled_and_unloaded_are_the_base():
    model, fresh = with_second(), plain()
    tensors = base_tensors(model)
    with model.disable_adapter():
        assert torch.equal(sample(model), sample(fresh))
    assert same_tensors(base_tensors(model), tensors)
    model.base_model.set_adapter([])
    assert torch.equal(sample(model), sample(fresh))
    bare = model.unload()
    assert torch.equal(sample(bare), sample(fresh)) and same_tensors(dict(bare.state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("picked", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("options", [{}, SMALL, {"shadow_num_hidden_layers": 1, "r": 2}], ids=["shared", "small", "r2"])
@torch.no_grad()
def test_computes_what_the_paper_says(options, picked):
    """Written out over the blocks of a plain Flux2; the backbone's blocks begin where the first chosen block does."""
    fresh, given = plain().double(), {k: v.double() for k, v in flux2_inputs().items()}
    model = wrapped(layers_to_transform=picked, **options).double()
    chosen = [0, 1, 2] if picked is None else picked
    assert model.peft_config["default"].target_modules == {f"{LIST}.{i}" for i in chosen}
    tensors = {k.replace(".default", ""): v for k, v in peft.get_peft_model_state_dict(model).items()}
    small = model.base_model.shadow_backbone["default"].model
    width, state = small.config.num_attention_heads * 8, []

    def part(i, name):
        return tensors[f"base_model.model.{LIST}.{i}.shadow_{name}.weight"]

    def mlp(i, name, x):
        for j, act in ((0, F.gelu), (2, lambda t: t)):
            path = f"base_model.model.{LIST}.{i}.shadow_update_{name}.{j}"
            x = act(x @ tensors[f"{path}.weight"].T + tensors[f"{path}.bias"])
        return x

    def before(i, kwargs):
        h = kwargs["hidden_states"]
        if not state:
            mods = torch.cat([m[:, :width] for m in kwargs["temb_mod"].split(16, dim=1)], dim=1)
            s = h[..., :width]
            for block in small.single_transformer_blocks:
                s = block(**{**kwargs, "hidden_states": s, "temb_mod": mods})
            state.append(s if width == 16 else s @ tensors["base_model.shadow_projection.weight"].T)
        return (), {**kwargs, "hidden_states": h + 0.5 * (h - state[0]) @ part(i, "down").T @ part(i, "up").T}

    def after(i, out):
        g = mlp(i, "gate", out).sigmoid()
        state[0] = (1 - g) * state[0] + g * mlp(i, "transform", out)

    for i in chosen:
        block = fresh.single_transformer_blocks[i]
        block.register_forward_pre_hook(lambda m, args, kwargs, i=i: before(i, kwargs), with_kwargs=True)
        block.register_forward_hook(lambda m, args, out, i=i: after(i, out))
    assert gap(model(**given).sample, fresh(**given).sample) < 1e-9


@pytest.mark.parametrize("name", ["shadow_flux2", "shadow_flux2_own", "shadow_flux2_small"])
def test_backbones_start_from_the_weights_that_upstream_chooses(name):
    """The fixtures were moved from their start by a rule that both know."""
    import cases

    case = cases.BY_NAME[name]
    wanted = load_file(cases.Path(cases.__file__).parent / "upstream" / name / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(cases.create(peft, case))
    keys = [k for k in wanted if "shadow_backbone" in k or "shadow_projection" in k]
    assert len(keys) > 20 and all(torch.equal(found[k], wanted[k]) for k in keys)


def test_backbones_begin_as_evenly_chosen_blocks_of_the_base():
    base = plain(num_layers=6, num_single_layers=10, num_attention_heads=3)
    model = wrapped(base, trained=False, shadow_num_hidden_layers=3, shadow_num_attention_heads=2)
    small = model.base_model.shadow_backbone["default"].model
    for name, chosen in (("transformer_blocks", (0, 2, 5)), (LIST, (0, 2, 4, 5, 7, 9))):
        for mine, i in zip(getattr(small, name), chosen, strict=True):
            its = {n.replace("base_layer.", ""): p for n, p in getattr(base, name)[i].named_parameters()}
            assert torch.equal(mine.attn.norm_q.weight, its["attn.norm_q.weight"])
    mine, its = small.single_transformer_blocks[1].attn, base.single_transformer_blocks[2].base_layer.attn
    rows = [*range(16), *range(24, 40), *range(48, 64), *range(72, 108), *range(108, 144)]  # q, k, v, gate, value
    assert torch.equal(mine.to_qkv_mlp_proj.weight, its.to_qkv_mlp_proj.weight[rows, :16])
    assert torch.equal(mine.to_out.weight, its.to_out.weight[:16, [*range(16), *range(24, 60)]])
    assert torch.equal(model.base_model.shadow_projection["default"].weight, torch.eye(24, 16))


@quiet
def test_starts_the_same_beside_another_adapter():
    """The base's weights are found below the first adapter's wrappers."""
    model = with_second()
    model.add_adapter("third", config())
    first = wrapped(trained=False).base_model.shadow_backbone["default"].state_dict()
    assert same_tensors(dict(model.base_model.shadow_backbone["third"].state_dict()), dict(first))


def test_half_precision_goes_through():
    model = wrapped(models.flux2_bf16())
    given = flux2_inputs(torch.bfloat16)
    assert model(**given).sample.dtype is torch.bfloat16
    assert next(model.base_model.shadow_backbone.parameters()).dtype is torch.bfloat16


# -- training ----------------------------------------------------------------------------------------------------
UNREAD = r"shadow_update|double_stream|single_stream|time_guidance|embedder|\.transformer_blocks|norm_out|proj_out"


@OPTIONS
def test_exactly_the_declared_tensors_get_gradients(options):
    model = wrapped(**options).train()
    model(**flux2_inputs()).sample.square().mean().backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    declared = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found <= declared and all("shadow_" in n for n in declared)
    # The last block's state is read by nobody, and of the backbone only the single-stream blocks are.
    assert all(re.search(UNREAD, n) for n in declared - found)
    assert len({n for n in declared - found if "shadow_update" in n}) == 8
    assert any(".shadow_backbone." in n and "to_qkv_mlp_proj" in n for n in found)
    assert any("shadow_projection" in n for n in found) is (options is SMALL)


def recompute(function, *args):
    """A user's own choice of checkpointing."""
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


@pytest.mark.parametrize("how", [None, recompute], ids=["default", "own"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"target_modules": [f"{LIST}.1", f"{LIST}.2"], **SMALL}], ids=["all", "some"])
def test_checkpointing_gives_the_same_gradients(options, when, how):
    """diffusers recomputes whole adapted blocks, the first of which runs the backbone."""

    def grads(enabled):
        base = flux2()
        if enabled == "before":
            base.enable_gradient_checkpointing(how)
        model = wrapped(base, shadow_dropout=0.0, **options)
        if enabled == "after":
            model.enable_gradient_checkpointing(how)
        model.train()(**flux2_inputs()).sample.square().mean().backward()
        assert base.is_gradient_checkpointing is (enabled is not None)
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted, found = grads(None), grads(when)
    assert len(wanted) == len(found) > 10 and all(gap(a, b) < 1e-6 for a, b in zip(wanted, found))


def test_reentrant_checkpointing_is_refused():
    """It would run blocks without gradients first, and so lose what the states owe to earlier blocks."""
    model = wrapped()
    model.enable_gradient_checkpointing(lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=True))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.train()(**flux2_inputs())
    assert torch.equal(sample(model.eval()), sample(wrapped()))


def test_dropout_acts_in_training_only():
    model = wrapped(shadow_dropout=0.5)
    assert torch.equal(sample(model), sample(model))
    model.train()
    assert gap(sample(model), sample(model)) > 1e-3


def test_switching_what_is_trained():
    model = with_second()

    def trained():
        return {re.search(r"\.(default|second)\.", n).group(1) for n, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"default"}
    model.set_adapter("second")
    assert trained() == {"second"}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()


# -- files and copies --------------------------------------------------------------------------------------------
@quiet
def test_files_hold_all_of_it(tmp_path):
    model = with_second()
    first = sample(model)
    model.set_adapter("second")
    second = sample(model)
    model.save_pretrained(tmp_path)
    assert gap(first, second) > 1e-3
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["auto_mapping"]["base_model_class"] == "Flux2Transformer2DModel"
    loaded = peft.PeftModel.from_pretrained(flux2(), tmp_path)
    assert torch.equal(sample(loaded), first) and not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path / "second", "another")
    assert torch.equal(sample(loaded), first)
    loaded.set_adapter("another")
    assert torch.equal(sample(loaded), second)
    loaded.delete_adapter("another")
    assert torch.equal(sample(loaded), first) and not any("another" in n for n, _ in loaded.named_parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_exact_and_independent(how):
    model = with_second()
    before = sample(model)
    model(**flux2_inputs())
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(sample(twin), before)
    train_a_little(twin, "default", 77)
    changed = sample(twin)
    assert gap(changed, before) > 1e-3 and torch.equal(sample(model), before)
    twin.set_adapter("second")
    assert not torch.equal(sample(twin), changed) and torch.equal(sample(model), before)


def test_a_second_adapter_leaves_no_trace():
    alone = sample(wrapped())
    model = with_second()
    assert torch.equal(sample(model), alone)
    model.set_adapter("second")
    assert gap(sample(model), sample(plain())) > 1e-3 and gap(sample(model), alone) > 1e-3
    model.set_adapter("default")
    assert torch.equal(sample(model), alone)
    model.delete_adapter("second")
    assert torch.equal(sample(model), alone) and list(model.base_model.shadow_backbone) == ["default"]


@quiet
def test_backbone_from_a_folder(tmp_path):
    """A smaller Flux2 that was trained: its blocks are its own, and its embeddings stay as they are."""
    small = flux2(num_attention_heads=1, num_layers=1, num_single_layers=1)
    small.save_pretrained(tmp_path / "small")
    flux2(in_channels=8).save_pretrained(tmp_path / "other")
    flux2(num_attention_heads=3).save_pretrained(tmp_path / "wider")
    model = wrapped(shadow_model=str(tmp_path / "small"), trained=False)
    backbone = model.base_model.shadow_backbone["default"]
    assert same_tensors(dict(backbone.model.state_dict()), dict(small.state_dict()))
    frozen = {n.split(".")[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"time_guidance_embed", "x_embedder", "context_embedder"}
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(sample(peft.PeftModel.from_pretrained(flux2(), tmp_path / "adapter")), sample(model))
    for folder, says in (("other", "the base's in_channels, 4, and has 8"), ("wider", "at most the base's 2")):
        with pytest.raises(ValueError, match=says):
            wrapped(shadow_model=str(tmp_path / folder))


# -- calls -------------------------------------------------------------------------------------------------------
def test_ways_to_call():
    model, given = wrapped(), flux2_inputs()
    with torch.no_grad():
        assert torch.equal(model(*given.values()).sample, sample(model))
        assert torch.equal(model(**given, return_dict=False)[0], sample(model))
        assert torch.equal(sample(model, joint_attention_kwargs={}), sample(model))
    with pytest.raises(ValueError, match="kv_cache_mode"):
        sample(model, kv_cache_mode="extract", num_ref_tokens=2)


def test_threads_do_not_share_states():
    model = wrapped()
    inputs = [{"hidden_states": models.noise((1, 6, 4), 20 + i)} for i in range(3)]
    inputs = [{**{k: v[:1] if len(v) == 2 else v for k, v in flux2_inputs().items()}, **given} for given in inputs]
    wanted, found = [sample(model, **given) for given in inputs], [[] for _ in inputs]

    def work(i):
        for _ in range(10):
            found[i].append(gap(sample(model, **inputs[i]), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(len(f) == 10 and max(f) < 1e-6 for f in found)


# -- refusals ----------------------------------------------------------------------------------------------------
def test_what_cannot_be_asked_for_is_refused():
    model = with_second()
    before = sample(model)
    for ask, error, says in [
        (lambda: model.merge_adapter(), NotImplementedError, "cannot be merged"),
        (lambda: model.unload_shadow(), NotImplementedError, "makes no images alone"),
        (lambda: sample(model, adapter_names=["default", "second"]), ValueError, "runs beside the whole model"),
        (lambda: sample(model.get_base_model()), ValueError, "not called through its PeftModel"),
    ]:
        with pytest.raises(error, match=says):
            ask()
        assert torch.equal(sample(model), before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shadow_num_hidden_layers": 2}, "shadow_num_hidden_layers=2 is too many"),
        ({"shadow_hidden_size": 12}, "shadow_hidden_size=12 must be"),
        ({"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}, "shadow_num_attention_heads is 2"),
        ({"shadow_num_attention_heads": 3}, "shadow_num_attention_heads must be at most the base's 2"),
        ({"shadow_intermediate_size": 25}, "shadow_intermediate_size must be at most the base's 24"),
        ({"target_modules": ["transformer_blocks.0"]}, "members of a Flux2 transformer's single_transformer_blocks"),
        ({"target_modules": ["single_transformer_blocks.0.attn.to_out"]}, "to_out is none"),
        ({"layers_to_transform": [7]}, r"layers_to_transform=\[7\]"),
    ],
)
@quiet
def test_what_does_not_fit_leaves_no_trace(changes, says):
    model = flux2()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=says):
        peft.get_peft_model(model, config(**changes))
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def other_flux():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    return diffusers.FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), **sizes
    )


def unet():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    return diffusers.UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, **blocks)


@pytest.mark.parametrize("make", [other_flux, unet])
@pytest.mark.parametrize("targets", [None, ["conv_in", "single_transformer_blocks.0"]])
def test_other_diffusion_models_are_refused(make, targets):
    with pytest.raises(ValueError, match="Flux2 transformer; "):
        peft.get_peft_model(make(), config(target_modules=targets))
