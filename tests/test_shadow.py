"""Shadow: the laws of a method, on whole models, beside which it runs another."""

from __future__ import annotations

import copy
import pickle
import threading

import models
import pytest
import torch
import torch.nn.functional as F
from laws_table import base_tensors, gap, quiet, same_tensors, train_a_little, under_checkpointing

import peft

BASES = ["llama", "gpt2", "moe", "llama_bf16", "llama_classifier"]
ANY = pytest.mark.parametrize("base", BASES)
IDS = models.inputs("llama")["input_ids"]
LEFT = torch.tensor([[0, 0, 5, 9, 33], [1, 17, 3, 3, 40]])
SMALL = {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}


def task_of(base):
    return "SEQ_CLS" if base.endswith("classifier") else "CAUSAL_LM"


def config(base="llama", **changes):
    """An adapter on all blocks, strong enough to see."""
    return peft.ShadowConfig(**{"r": 4, "shadow_alpha": 0.5, "task_type": task_of(base), **changes})


@quiet
def wrapped(base="llama", trained=True, **changes):
    """A model with an adapter, in eval mode."""
    torch.manual_seed(0)
    made = models.build(base) if isinstance(base, str) else base
    model = peft.get_peft_model(made, config(base if isinstance(base, str) else "llama", **changes))
    if trained:
        train_a_little(model)
    return model.eval()


@quiet
def with_second(base="llama", **changes):
    """A model with two adapters, the first of them active."""
    model = wrapped(base)
    last = sorted(config_targets(model))[-1]
    model.add_adapter("second", config(base, **{"r": 2, "target_modules": [last], **SMALL, **changes}))
    train_a_little(model, "second", 5000)
    return model.eval()


def config_targets(model):
    return model.peft_config["default"].target_modules


@torch.no_grad()
def logits(model, ids=IDS, **call):
    """The model's logits."""
    return model(input_ids=ids, **call).logits


# -- values ------------------------------------------------------------------------------------------------------
@ANY
def test_starts_as_the_base_bit_for_bit(base):
    model = wrapped(base, trained=False)
    assert torch.equal(logits(model), logits(models.build(base)))
    train_a_little(model)
    assert gap(logits(model), logits(models.build(base))) > 1e-3
    assert gap(logits(wrapped(base, trained=False, init_weights=False)), logits(models.build(base))) > 1e-3


@ANY
def test_disabled_and_unloaded_are_the_base(base):
    model, fresh = with_second(base), models.build(base)
    tensors = base_tensors(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(fresh))
    assert same_tensors(base_tensors(model), tensors)
    model.base_model.set_adapter([])
    assert torch.equal(logits(model), logits(fresh))
    plain = model.unload()
    assert torch.equal(logits(plain), logits(fresh)) and same_tensors(
        dict(plain.state_dict()), dict(fresh.state_dict())
    )


@pytest.mark.parametrize("picked", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("sizes", [{}, SMALL, {"share_embeddings": False}], ids=["shared", "small", "own"])
@torch.no_grad()
def test_computes_what_the_paper_says(sizes, picked):
    """Written out over the blocks of a plain Llama, which carry the state from one chosen block to the next."""
    fresh = models.llama(num_hidden_layers=3).double()
    model = wrapped(models.llama(num_hidden_layers=3), layers_to_transform=picked, **sizes).double()
    chosen = [0, 1, 2] if picked is None else picked
    assert config_targets(model) == {f"model.layers.{i}" for i in chosen}
    tensors = {k.replace(".default", ""): v for k, v in peft.get_peft_model_state_dict(model).items()}
    backbone = model.base_model.shadow_backbone["default"]
    given = {"inputs_embeds": fresh.model.embed_tokens(IDS)} if not sizes else {"input_ids": IDS}
    state = [backbone(**given).last_hidden_state]
    if sizes is SMALL:
        state[0] = state[0] @ tensors["base_model.shadow_projection.weight"].T

    def part(i, name):
        return tensors[f"base_model.model.model.layers.{i}.shadow_{name}.weight"]

    def mlp(i, name, x):
        for j, act in ((0, F.gelu), (2, lambda t: t)):
            path = f"base_model.model.model.layers.{i}.shadow_update_{name}.{j}"
            x = act(x @ tensors[f"{path}.weight"].T + tensors[f"{path}.bias"])
        return x

    for i in chosen:
        block = fresh.model.layers[i]

        def before(module, args, i=i):
            return args[0] + 0.5 * (args[0] - state[0]) @ part(i, "down").T @ part(i, "up").T, *args[1:]

        def after(module, args, out, i=i):
            g = mlp(i, "gate", out).sigmoid()
            state[0] = (1 - g) * state[0] + g * mlp(i, "transform", out)

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    assert gap(logits(model), logits(fresh)) < 1e-9


@pytest.mark.parametrize("base", ["llama", "llama_classifier"])
def test_loss_has_the_share_of_what_the_backbone_predicts_alone(base):
    model = wrapped(base, auxiliary_loss_weight=0.3)
    mask = (LEFT.flip(1) != 0).long()  # padded on the right
    labels = torch.tensor([0, 2]) if base == "llama_classifier" else LEFT.flip(1).where(mask.bool(), -100)
    batch = {"input_ids": LEFT.flip(1), "attention_mask": mask}
    with torch.no_grad():
        out = model(**batch, labels=labels)
        alone = model.unload_shadow()(**batch, labels=labels)
        if base == "llama":
            own = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            told = F.cross_entropy(alone.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            own, told = F.cross_entropy(out.logits, labels), F.cross_entropy(alone.logits, labels)
    assert gap(out.loss, own + 0.3 * told) < 1e-5 and gap(model.last_shadow_loss, told) < 1e-5
    assert gap(alone.loss, told) < 1e-5 and gap(own, told) > 1e-3
    model.last_shadow_loss = None
    assert model(**batch).get("loss") is None
    without = wrapped(base, auxiliary_loss_weight=0.0)
    assert gap(without(**batch, labels=labels).loss.detach(), own) < 1e-5 and without.last_shadow_loss is None


def test_loss_of_accumulated_batches_is_that_of_the_whole():
    model = wrapped()
    whole = model(input_ids=IDS, labels=IDS).loss
    count = torch.tensor(IDS[:, 1:].numel())
    parts = [model(input_ids=IDS[i : i + 1], labels=IDS[i : i + 1], num_items_in_batch=count).loss for i in range(2)]
    assert gap(sum(parts).detach(), whole.detach()) < 1e-5


# -- training ----------------------------------------------------------------------------------------------------
@ANY
def test_exactly_the_declared_tensors_get_gradients(base):
    model = with_second(base).train()
    labels = torch.tensor([0, 2]) if base == "llama_classifier" else IDS
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss.backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    declared = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found <= declared and not any(".second" in n for n in declared)
    silent = {n for n in declared - found if "shadow_update" in n}  # the last block's state is read by nobody
    last = max(config_targets(model))
    assert len(silent) == 8 and all(f".{last}." in n for n in silent)
    # A GPT-2 beside a GPT-2 has token embeddings that it does not read; which experts a router picks, chance decides.
    assert all("wte" in n or "experts" in n or "gate.weight" in n for n in declared - found - silent)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@quiet
def test_checkpointing_gives_the_same_gradients(base, reentrant):
    both = under_checkpointing(lambda: wrapped(base, shadow_dropout=0.0), reentrant, input_ids=IDS, labels=IDS)
    grads = [[g for g in each if g is not None] for each in both]
    assert len(grads[0]) == len(grads[1]) > 10 and all(gap(a, b) < 1e-5 for a, b in zip(*grads))


def test_dropout_acts_in_training_only():
    model = wrapped(shadow_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert gap(logits(model), logits(model)) > 1e-3


def test_switching_what_is_trained():
    model = with_second()

    def trained():
        names = [n.replace(".default", "").split("shadow_")[1] for n, p in model.named_parameters() if p.requires_grad]
        return {n.split(".")[0] for n in names}, any(
            ".second" in n for n, p in model.named_parameters() if p.requires_grad
        )

    everything = {"down", "up", "update_transform", "update_gate", "backbone"}
    assert trained() == (everything, False)
    model.set_adapter("second")
    assert trained() == (everything | {"projection"}, True)
    model.set_adapter("default", inference_mode=True)
    assert trained() == (set(), False)
    model.set_requires_grad("default")
    assert trained() == (everything, False)
    model.set_requires_grad("default", False)
    model.set_adapter("default")
    assert trained() == (set(), False)


# -- files and copies --------------------------------------------------------------------------------------------
@ANY
@quiet
def test_files_hold_all_of_it(base, tmp_path):
    model = with_second(base)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    assert gap(first, second) > 1e-3

    def near(found, wanted):
        return gap(found, wanted) < (0.02 if found.dtype is torch.bfloat16 else 2e-6)

    loaded = peft.PeftModel.from_pretrained(models.build(base), tmp_path)
    assert near(logits(loaded), first) and not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path / "second", "another")
    assert near(logits(loaded), first)
    loaded.set_adapter("another")
    assert near(logits(loaded), second)
    loaded.delete_adapter("another")
    assert loaded.active_adapters == ["default"] and near(logits(loaded), first)
    assert not any("another" in n for n, _ in loaded.named_parameters())
    again = peft.PeftModel.from_pretrained(models.build(base), tmp_path / "second", is_trainable=True)
    assert near(logits(again.eval()), second) and any(
        p.requires_grad for p in again.base_model.shadow_backbone.parameters()
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_exact_and_independent(how):
    model = with_second()
    before = logits(model)
    model(input_ids=IDS, labels=IDS)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), before)
    train_a_little(twin, "default", 77)
    changed = logits(twin)
    assert gap(changed, before) > 1e-3 and torch.equal(logits(model), before)
    twin.set_adapter("second")
    assert not torch.equal(logits(twin), changed) and torch.equal(logits(model), before)


def test_second_adapter_works_before_the_first_forward_and_leaves_no_trace():
    """Upstream's does nothing if it is added before any forward, or has fewer blocks than the first."""
    alone = logits(wrapped())
    model = with_second()
    model.set_adapter("second")
    assert gap(logits(model), logits(models.build("llama"))) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.delete_adapter("second")
    assert torch.equal(logits(model), alone) and list(model.base_model.shadow_backbone) == ["default"]
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(models.build("llama")))
    assert not any("shadow" in n for n, _ in model.named_parameters())


# -- calls -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, SMALL, {"share_embeddings": False, "shadow_num_hidden_layers": 2}], ids=str)
@pytest.mark.parametrize("base", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_with_and_without_cache(base, options, beams):
    """The backbone's keys and values are cached, reordered and cropped with the base's."""
    model = wrapped(base, **options)
    batch = {"input_ids": LEFT, "attention_mask": (LEFT != 0).long(), "max_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(**batch, num_beams=beams, eos_token_id=None, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 13)
    with model.disable_adapter():
        alone = model.generate(**batch, num_beams=beams, eos_token_id=None)
    assert torch.equal(alone, models.build(base).generate(**batch, num_beams=beams, eos_token_id=None))
    assert not torch.equal(alone, cached) and not model.get_base_model()._forward_pre_hooks


@pytest.mark.parametrize("options", [{}, SMALL], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
@torch.no_grad()
def test_a_cache_goes_on_where_it_ended(options, fresh):
    from transformers import DynamicCache

    model = wrapped(**options)
    whole = logits(model)
    cache = DynamicCache() if fresh else None
    out = model(input_ids=IDS[:, :3], use_cache=True, cache=cache)
    found = [out.logits]
    for i in (3, 4):
        out = model(input_ids=IDS[:, i : i + 1], cache=out.cache)
        found.append(out.logits)
    out.cache.crop(-1)
    out = model(input_ids=IDS[:, 4:7], cache=out.cache)
    assert gap(torch.cat([*found[:-1], out.logits], dim=1), whole) < 1e-5


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    from transformers import StaticCache

    model = with_second(shadow_num_hidden_layers=2)
    with model.disable_adapter():
        bare = model(input_ids=IDS[:, :3], use_cache=True).cache
    left = model(input_ids=IDS[:, :2], use_cache=True).cache
    with model.disable_adapter():
        model(input_ids=IDS[:, 2:3], cache=left)
    model.set_adapter("second")
    others = model(input_ids=IDS[:, :3], use_cache=True).cache
    model.set_adapter("default")
    for cache in (bare, left, others):
        with pytest.raises(ValueError, match="made without the active Shadow adapter"):
            model(input_ids=IDS[:, 3:], cache=cache)
    with pytest.raises(ValueError, match="not a StaticCache"):
        model(input_ids=IDS, cache=StaticCache(config=model.config, max_cache_len=20))


def test_embeddings_in_place_of_ids():
    model = wrapped()
    embeds = model.get_input_embeddings()(IDS)
    assert gap(model(inputs_embeds=embeds).logits.detach(), logits(model)) < 1e-6
    assert gap(model(IDS).logits.detach(), logits(model)) < 1e-6
    with pytest.raises(ValueError, match="needs input_ids"):
        wrapped(**SMALL)(inputs_embeds=embeds)


def test_threads_do_not_share_states():
    model = wrapped()
    inputs = [torch.randint(3, 60, (1, 4 + i % 2)) for i in range(4)]
    wanted, found = [logits(model, ids) for ids in inputs], [[] for _ in inputs]

    def work(i):
        for _ in range(20):
            found[i].append(gap(logits(model, inputs[i]), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(len(f) == 20 and max(f) < 1e-6 for f in found)


# -- the backbone ------------------------------------------------------------------------------------------------
@quiet
def test_backbone_from_a_folder(tmp_path):
    """A model that was trained: its sizes and embeddings are its own, and the embeddings stay."""
    small = models.llama(hidden_size=8, num_hidden_layers=1)
    small.save_pretrained(tmp_path / "small")
    model = wrapped(shadow_model=str(tmp_path / "small"))
    backbone = model.base_model.shadow_backbone["default"]
    assert [n for n, p in backbone.named_parameters() if not p.requires_grad] == ["embed_tokens.weight"]
    fresh = wrapped(shadow_model=str(tmp_path / "small"), trained=False).base_model.shadow_backbone["default"]
    assert same_tensors(dict(fresh.state_dict()), dict(small.model.state_dict()))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "adapter")
    assert gap(logits(loaded), logits(model)) < 2e-6
    with pytest.raises(ValueError, match="leave out shadow_hidden_size"):
        config(shadow_model=str(tmp_path / "small"), shadow_hidden_size=8)


@pytest.mark.parametrize("options", [{}, SMALL, {"share_embeddings": False}], ids=["shared", "small", "own"])
@torch.no_grad()
def test_backbone_alone(options):
    """What the auxiliary loss has trained: it needs no base model to predict."""
    model = wrapped(**options)
    before = logits(model)
    alone = model.unload_shadow(copy=True)
    expected = model.base_model.shadow_backbone["default"](
        **({"inputs_embeds": model.get_input_embeddings()(IDS)} if not options else {"input_ids": IDS})
    ).last_hidden_state
    expected = model.get_base_model().lm_head(model.base_model.shadow_projection["default"](expected))
    assert gap(alone(input_ids=IDS).logits, expected) < 1e-6
    ids = [alone.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*ids)
    for p in alone.parameters():
        p.zero_()
    assert torch.equal(logits(model), before)


def test_sizes_of_a_mirror():
    model = wrapped(models.llama(num_hidden_layers=3), shadow_num_hidden_layers=2, shadow_intermediate_size=10)
    made = model.base_model.shadow_backbone["default"].config
    assert (made.num_hidden_layers, made.hidden_size, made.intermediate_size) == (2, 16, 10)
    assert wrapped("gpt2", shadow_intermediate_size=10).base_model.shadow_backbone["default"].config.n_inner == 10
    with pytest.raises(ValueError, match="multiple of the base model's 2 key and value heads"):
        wrapped(shadow_num_attention_heads=3)


def test_blocks_of_different_types():
    """What a config says layer by layer is cut to the mirror's depth."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 4}
    made = Gemma2Config(**sizes, num_hidden_layers=3, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
    model = wrapped(models.fill(Gemma2ForCausalLM(made)))
    assert len(model.base_model.shadow_backbone["default"].config.layer_types) == 1
    cached, plain = (
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(cached, plain)


# -- refusals ----------------------------------------------------------------------------------------------------
def test_what_cannot_be_asked_for_is_refused():
    model = with_second()
    before = logits(model)
    for ask, error, says in [
        (lambda: model.merge_adapter(), NotImplementedError, "cannot be merged"),
        (lambda: model.merge_and_unload(), NotImplementedError, "cannot be merged"),
        (lambda: model.base_model.set_adapter(["default", "second"]), ValueError, "One Shadow adapter"),
        (lambda: logits(model, adapter_names=["default", "second"]), ValueError, "runs beside the whole model"),
        (lambda: model.get_base_model()(input_ids=IDS), ValueError, "not called through its PeftModel"),
        (lambda: model.unload_shadow("other"), ValueError, "does not exist"),
        (lambda: peft.inject_adapter_in_model(config(), models.build("llama")), ValueError, "use get_peft_model"),
    ]:
        with pytest.raises(error, match=says):
            ask()
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        ("t5", {"target_modules": r".*block\.\d+"}, "Encoder-decoders"),
        ("mlp", {}, "plain modules"),
        ("bert_classifier", {}, "no list of blocks"),
        ("llama", {"target_modules": ["q_proj"]}, "members of a list"),
        ("llama", {"layers_to_transform": [7]}, r"layers_to_transform=\[7\]"),
        ("llama", {"shadow_num_attention_heads": 1}, "multiple of"),
        ("gpt2", {"shadow_num_attention_heads": 3}, "divisible"),
    ],
)
@quiet
def test_what_does_not_fit_leaves_no_trace(base, changes, says):
    model = models.build(base)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=says):
        peft.get_peft_model(model, config(base, **changes))
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"shadow_dropout": 1.5}, "shadow_dropout must be"),
        ({"shadow_alpha": float("nan")}, "shadow_alpha must be"),
        ({"auxiliary_loss_weight": -1.0}, "auxiliary_loss_weight must be"),
        ({"shadow_num_hidden_layers": 0}, "shadow_num_hidden_layers must be"),
        ({"update_hidden_size": 0}, "update_hidden_size must be"),
        ({"shadow_model": ""}, "shadow_model is empty"),
        ({"target_modules": "all-linear"}, "whole blocks"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
)
def test_config_names_the_wrong_field(changes, says):
    with pytest.raises(ValueError, match=says):
        config(**changes)
