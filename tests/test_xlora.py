"""X-LoRA: files and outputs of upstream's, and the laws of a method, on whole models."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading

import make_xlora
import models
import pytest
import torch
from helpers import FIXTURES, offline, python, upstream_python
from laws_table import base_tensors, gap, quiet, same_tensors
from safetensors.torch import load_file, save_file

import peft

HOME = FIXTURES / "xlora"
IDS = models.inputs("llama")["input_ids"]
CASES = pytest.mark.parametrize("case", make_xlora.CASES)


def assembled(case, folder):
    """An upstream fixture as a folder with its experts in subfolders."""
    shutil.copytree(HOME / case, folder)
    shutil.copytree(HOME / "experts", folder, dirs_exist_ok=True)
    return folder


def base_model(name="llama"):
    """A base model that caches nothing."""
    model = models.build(name)
    model.config.use_cache = False
    return model


def config(names=("code", "math"), **changes):
    """A mixture of the fixtures' experts, under other names."""
    adapters = {name: str(HOME / "experts" / str(i % 2)) for i, name in enumerate(names)}
    return peft.XLoraConfig(**{"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": adapters, **changes})


@quiet
def wrapped(names=("code", "math"), base="llama", seed=7, **changes):
    """A model with a mixture whose classifier has moved from its start, in eval mode."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(base), config(names, **changes))
    with torch.no_grad():
        for i, p in enumerate(model.base_model.internal_xlora_classifier.parameters()):
            p.add_(0.5 * models.noise(p.shape, seed + i).to(p.dtype))
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS, **call):
    """The model's logits."""
    return model(input_ids=ids, **call).logits


# -- upstream ----------------------------------------------------------------------------------------------------
@CASES
def test_loads_upstream_file_with_equal_outputs(case, tmp_path):
    folder = assembled(case, tmp_path / "made")
    expected = load_file(folder / "expected.safetensors")
    model = peft.PeftModel.from_pretrained(make_xlora.base_of(case), folder)
    found = make_xlora.outputs(model, case)
    tolerance = 0.05 if case == "bf16" else 1e-5
    assert found.keys() == expected.keys() and torch.equal(found["ids"], expected["ids"])
    for key in ("logits", "scalings"):
        torch.testing.assert_close(found[key], expected[key], atol=tolerance, rtol=tolerance)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@CASES
def test_saves_again_what_it_loaded(case, tmp_path):
    folder = assembled(case, tmp_path / "made")
    peft.PeftModel.from_pretrained(make_xlora.base_of(case), folder).save_pretrained(tmp_path / "again")
    for sub in ("", "0", "1"):
        old, new = folder / sub, tmp_path / "again" / sub
        name = "adapter_model.safetensors"
        assert same_tensors(dict(load_file(new / name)), dict(load_file(old / name)))
        old, new = (json.loads((f / "adapter_config.json").read_text()) for f in (old, new))
        assert {**old, "peft_version": "", "target_modules": sorted(old.get("target_modules", ()))} == {
            **new, "peft_version": "", "target_modules": sorted(new.get("target_modules", ()))
        }  # fmt: skip


@CASES
def test_trains_the_same_parameters(case):
    from safetensors import safe_open

    with safe_open(HOME / case / "expected.safetensors", "pt") as file:
        wanted = file.metadata()["trainable"].split("\n")
    _, options = make_xlora.CASES[case]
    model = peft.get_peft_model(make_xlora.base_of(case), config(**options))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == wanted


@pytest.mark.slow
@CASES
def test_upstream_loads_our_file_with_equal_outputs(case, tmp_path):
    if (interpreter := upstream_python()) is None:
        pytest.skip("no upstream environment: set PEFT_UPSTREAM_PYTHON")
    base, options = make_xlora.CASES[case]
    model = wrapped(("0", "1"), base, **options)
    model.save_pretrained(tmp_path / "made")
    env = offline()
    env.pop("PYTHONPATH", None)
    out = tmp_path / "out.safetensors"
    python(
        str(FIXTURES / "make_xlora.py"),
        "read",
        str(tmp_path / "made"),
        case,
        str(out),
        interpreter=interpreter,
        env=env,
    )
    found, wanted = load_file(out), make_xlora.outputs(model, case)
    tolerance = 0.05 if case == "bf16" else 1e-5
    for key in ("logits", "scalings"):
        torch.testing.assert_close(found[key], wanted[key], atol=tolerance, rtol=tolerance)


# -- values ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"layerwise_scalings": True}, {"enable_softmax": False}])
@torch.no_grad()
def test_computes_what_the_paper_says(options, value):
    """Each expert's update, weighed by the classifier's word on the hidden states of the first pass."""
    model = wrapped(("code", "math", "third"), scaling_pass_value=value, global_scaling_weight=0.8, **options)
    classifier, experts = model.base_model.internal_xlora_classifier, ("code", "math", "third")
    keys, hooks, weights = list(model.base_model.layers), {}, {}
    for name in experts:
        for k, v in peft.get_peft_model_state_dict(model, adapter_name=name).items():
            weights[name, k.removeprefix("base_model.model.").replace(".lora_", " ").split(".weight")[0]] = v

    def run(scalings, base):
        for layer, key in enumerate(keys):

            def add(module, args, out, layer=layer, key=key):
                for i, name in enumerate(experts):
                    if (name, f"{key} A") in weights:
                        A, B = weights[name, f"{key} A"], weights[name, f"{key} B"]
                        update = args[0] @ A.T @ B.T * (6 / len(A))
                        out = out + 0.8 * scalings[..., layer, i, None] * update
                return out

            hooks[key] = base.get_submodule(key).register_forward_hook(add)
        out = base(input_ids=IDS, output_hidden_states=True)
        for hook in hooks.values():
            hook.remove()
        return out

    fresh = base_model()
    hidden = run(torch.full((1, 1, len(keys), 3), value), fresh).hidden_states[-1]
    said = classifier.layers(hidden).reshape(*IDS.shape, -1, 3).expand(-1, -1, len(keys), -1)
    said = said.softmax(-1) if options.get("enable_softmax", True) else said
    assert gap(logits(model), run(said, fresh).logits) < 1e-5
    assert gap(model.get_latest_scalings(), said) < 1e-5


def test_top_experts_of_each_token():
    """Softmax over the top experts is over those of a token, whatever else is in the batch."""
    model = wrapped(("a", "b", "c"), top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)
    alone = [logits(model, IDS[i : i + 1]) for i in range(2)]
    assert gap(logits(model), torch.cat(alone)) < 1e-5
    from peft.methods.xlora.classifier import gates

    found = gates(model.xlora_config, torch.tensor([[[[0.0, 2.0, 1.0]]]]))
    assert gap(found, torch.tensor([[[[0.0, 0.7310586, 0.2689414]]]])) < 1e-6


@pytest.mark.parametrize("names", [("0", "1"), ("code", "math"), ("9", "10")], ids=str)
def test_names_do_not_matter(names):
    """Upstream calls the experts 0, 1, ... and leaves those silent that the config calls otherwise."""
    model = wrapped(names)
    assert torch.equal(logits(model), logits(wrapped()))
    assert gap(logits(model), logits(base_model())) > 1e-2
    assert list(model.peft_config) == ["default", *names] and model.active_adapters == ["default"]
    assert any(f"lora_A.{names[0]}." in n for n, _ in model.named_parameters())


def test_experts_are_in_the_order_of_their_names(tmp_path):
    """Files sort the config's dict, so its order cannot count; ten comes after nine."""
    names = [str(i) for i in range(11)]
    backwards = config(names)
    backwards.adapters = dict(reversed(backwards.adapters.items()))
    assert backwards.experts == names and config(("b", "a", "2")).experts == ["2", "a", "b"]
    model, other = wrapped(names, xlora_depth=2, xlora_size=4), peft.get_peft_model(base_model(), config(names))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    assert gap(logits(loaded), logits(model)) < 2e-6 and list(other.peft_config) == ["default", *names]


@pytest.mark.parametrize("base", ["llama", "llama_bf16"])
def test_disabled_and_unloaded_are_the_base(base):
    model, fresh = wrapped(base=base), base_model(base)
    tensors = base_tensors(model)
    assert gap(logits(model), logits(fresh)) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(fresh))
        ids = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(ids, fresh.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
    assert same_tensors(base_tensors(model), tensors)
    model.base_model.set_adapter([])
    assert torch.equal(logits(model), logits(fresh))
    model.set_adapter("default")
    assert gap(logits(model), logits(fresh)) > 1e-2
    plain = model.unload()
    assert torch.equal(logits(plain), logits(fresh)) and same_tensors(
        dict(plain.state_dict()), dict(fresh.state_dict())
    )


def dora_and_dropout(tmp_path):
    """Experts that are more than two plain factors."""
    names = {}
    for name, options in {
        "dora": {"use_dora": True},
        "drop": {"lora_dropout": 0.5},
        "bias": {"lora_bias": True},
    }.items():
        model = peft.get_peft_model(
            models.llama(),
            peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"][: 1 + (name == "drop")], **options),
        )
        models.perturb(model, 9, 0.3)
        model.save_pretrained(tmp_path / name)
        names[name] = str(tmp_path / name)
    return names


@quiet
def test_other_kinds_of_lora_are_experts_too(tmp_path):
    """One expert with all the weight is that adapter alone."""
    paths = dora_and_dropout(tmp_path)
    model = wrapped(adapters=paths, enable_softmax=False)
    classifier = model.base_model.internal_xlora_classifier.layers[0]
    torch.nn.init.zeros_(classifier.weight)
    for i, path in enumerate(paths[name] for name in model.xlora_config.experts):
        with torch.no_grad():
            classifier.bias.copy_(torch.eye(3)[i])
        alone = peft.PeftModel.from_pretrained(base_model(), path)
        assert gap(logits(model), logits(alone)) < 1e-5
    assert gap(logits(model.train()), logits(model)) > 1e-2  # the last one, which acts now, has dropout


# -- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trainable", [False, True])
def test_exactly_the_declared_tensors_get_gradients(trainable):
    model = wrapped(use_trainable_adapters=trainable, xlora_depth=2, xlora_size=8).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    out = model(input_ids=IDS, labels=IDS)
    (out.loss + model.get_latest_scalings().square().mean()).backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert found == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in before if "classifier" in n or (trainable and ".lora_" in n)} == found
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == found


def test_switching_what_is_trained():
    model = wrapped()

    def trained():
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        return any("classifier" in n for n in names), any(".lora_" in n for n in names)

    assert trained() == (True, False)
    model.set_use_trainable_adapters(True)
    assert trained() == (True, True) and model.xlora_config.use_trainable_adapters
    model.set_adapter("default", inference_mode=True)
    assert trained() == (False, False)
    model.set_adapter("default")
    assert trained() == (True, True)
    model.set_use_trainable_adapters(False)
    assert trained() == (True, False)
    model.set_requires_grad("default", False)
    assert trained() == (False, False)


@quiet
def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = wrapped(use_trainable_adapters=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gap(a, b) < 1e-5 for a, b in zip(*grads))


# -- files and copies --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["llama", "llama_bf16"])
@quiet
def test_files_hold_all_of_it_and_need_nothing_else(base, tmp_path):
    model = wrapped(base=base, use_trainable_adapters=True, layerwise_scalings=True)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.add_(0.1)
    model.xlora_config.adapters = dict.fromkeys(model.xlora_config.adapters, "/nowhere")  # where they came from is gone
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["code", "math"]
    assert all("internal_xlora_classifier" in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(base_model(base), tmp_path)
    assert gap(logits(loaded), before) < (0.02 if base == "llama_bf16" else 2e-6)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = peft.PeftModel.from_pretrained(base_model(base), tmp_path, is_trainable=True)
    assert {n.split(".")[1] for n, p in again.named_parameters() if p.requires_grad} == {
        "internal_xlora_classifier",
        "model",
    }
    alone = peft.PeftModel.from_pretrained(base_model(base), tmp_path / "math")  # an expert is a LoRA like any other
    assert type(alone.base_model).__name__ == "LoraModel" and gap(logits(alone), logits(base_model(base))) > 1e-2


@quiet
def test_upstreams_own_folder_is_refused_but_not_its_experts(tmp_path):
    """Upstream puts base weights into the experts' folders: then their origin counts. Its classifier is lost."""
    folder = tmp_path / "saved"
    model = wrapped()
    model.save_pretrained(folder)
    for name in ("code", "math"):
        save_file(
            {"base_model.lora_model.model.lm_head.weight": torch.ones(2)}, folder / name / "adapter_model.safetensors"
        )
    assert gap(logits(peft.PeftModel.from_pretrained(base_model(), folder)), logits(model)) < 2e-6
    save_file({}, folder / "adapter_model.safetensors")
    fresh = base_model()
    with pytest.raises(peft.PeftError, match="holds no tensors"):
        peft.PeftModel.from_pretrained(fresh, folder)
    assert torch.equal(logits(fresh), logits(base_model())) and not hasattr(fresh, "peft_config")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_exact_and_independent(how):
    model = wrapped()
    if how == "deepcopy":
        model(input_ids=IDS)  # the latest scalings carry a graph
        twin = copy.deepcopy(model)
    else:  # transformers' hooks on a model that has returned hidden states cannot be pickled
        twin = pickle.loads(pickle.dumps(model))
    before = logits(model)
    assert torch.equal(logits(twin), before)
    twin.set_global_scaling_weight(3.0)
    assert gap(logits(twin), before) > 1e-2 and torch.equal(logits(model), before)
    with torch.no_grad():
        twin.base_model.internal_xlora_classifier.layers[0].bias.add_(torch.tensor([9.0, 0.0]))
    assert torch.equal(logits(model), before)


# -- calls -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beams", [1, 2])
def test_generates_what_single_calls_say(beams):
    model = wrapped()
    ids = torch.tensor([[1, 5, 9], [1, 8, 2]])
    found = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, num_beams=beams, eos_token_id=None)
    assert found.shape == (2, 8)
    step = ids
    for _ in range(5 if beams == 1 else 0):
        step = torch.cat([step, logits(model, step)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert beams > 1 or torch.equal(found, step)
    assert not model.get_base_model()._forward_pre_hooks


def test_embeddings_in_place_of_ids():
    model = wrapped()
    embeds = model.get_input_embeddings()(IDS)
    assert gap(model(inputs_embeds=embeds).logits.detach(), logits(model)) < 1e-6
    assert gap(model(IDS).logits.detach(), logits(model)) < 1e-6


def test_threads_do_not_share_scalings():
    model = wrapped()
    inputs = [torch.randint(3, 60, (1, 4 + i)) for i in range(4)]
    wanted, found = [logits(model, ids) for ids in inputs], [[] for _ in inputs]

    def work(i):
        for _ in range(15):
            found[i].append(gap(logits(model, inputs[i]), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(len(f) == 15 and max(f) < 1e-6 for f in found)


def test_settings_act_and_are_saved(tmp_path):
    model = wrapped()
    plain, seen = logits(model), []
    for change in (
        lambda: model.set_topk_lora(1),
        lambda: model.set_global_scaling_weight(0.5),
        lambda: model.set_scaling_pass_value(None),
    ):
        change()
        seen.append(logits(model))
    assert all(gap(a, b) > 1e-4 for a, b in zip([plain, *seen], seen))
    assert model.get_global_scaling_weight() == 0.5 and model.xlora_config.scaling_pass_value == 0.5
    model.save_pretrained(tmp_path)
    assert gap(logits(peft.PeftModel.from_pretrained(base_model(), tmp_path)), seen[-1]) < 2e-6
    model.set_topk_lora(None)
    model.set_global_scaling_weight(1)
    model.set_scaling_pass_value(0)
    assert torch.equal(logits(model), plain)
    for wrong in (0, -1, 3):
        with pytest.raises(ValueError, match="top_k_lora must be from 1 to 2"):
            model.set_topk_lora(wrong)


def test_log_of_scalings():
    model = wrapped()
    assert model.get_latest_scalings() is None
    logits(model)
    layers = len(model.base_model.layers)
    assert model.get_latest_scalings().shape == (2, 7, layers, 2) and model.get_scalings_log() == []
    model.enable_scalings_logging()
    for ids in (IDS, IDS[:, :3], IDS):
        logits(model, ids)
    model.disable_scalings_logging()
    logits(model)
    assert [t.shape[1] for t in model.get_scalings_log()] == [7, 3, 7]
    buckets = model.get_bucketed_scalings_log()
    assert {k: v[0] for k, v in buckets.items()} == {7: [0, 2], 3: [1]}
    assert torch.equal(buckets[3][1][0], model.get_scalings_log()[1])
    model.clear_scalings_log()
    assert model.get_scalings_log() == [] and model.get_bucketed_scalings_log() == {}
    model.enable_scalings_logging()
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [t.shape[1] for t in model.get_scalings_log()] == [7, 8, 9]


# -- refusals ----------------------------------------------------------------------------------------------------
def test_what_cannot_be_asked_for_is_refused():
    model = wrapped()
    before = logits(model)
    for ask, error, says in [
        (lambda: model.merge_adapter(), NotImplementedError, "cannot be merged"),
        (lambda: model.merge_and_unload(), NotImplementedError, "cannot be merged"),
        (lambda: model.set_adapter("math"), ValueError, "cannot act alone"),
        (lambda: model.delete_adapter("math"), ValueError, "for all of them"),
        (lambda: model.delete_adapter("other"), ValueError, "does not exist"),
        (lambda: model.add_adapter("other", config(("x", "y"))), ValueError, "one X-LoRA adapter"),
        (lambda: model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"])), ValueError, "cannot take one"),
        (lambda: logits(model, adapter_names=["code", "math"]), ValueError, "weighs its experts itself"),
        (lambda: logits(model, use_cache=True), ValueError, "use_cache=False"),
        (lambda: model.get_base_model()(input_ids=IDS), ValueError, "not called through its PeftModel"),
        (lambda: peft.inject_adapter_in_model(config(), base_model()), ValueError, "use get_peft_model"),
    ]:
        with pytest.raises(error, match=says):
            ask()
        assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default", "code", "math"] and not model.supports_lora_conversion()


def test_delete_takes_everything_and_makes_room():
    model = wrapped()
    before, plain = logits(model), logits(base_model())
    model.delete_adapter("default")
    assert model.peft_config == {} and torch.equal(logits(model), plain)
    assert not any("lora" in n for n, _ in model.named_parameters())
    model.add_adapter("again", config())
    model.set_adapter("again")
    assert gap(logits(model), plain) > 1e-3 and not torch.equal(logits(model), before)


def saved_head(tmp_path):
    """A LoRA that trains a module whole."""
    model = peft.get_peft_model(models.llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "head")
    return {"good": str(HOME / "experts" / "0"), "head": str(tmp_path / "head")}


@quiet
def test_what_does_not_fit_leaves_no_trace(tmp_path):
    ia3 = peft.get_peft_model(models.llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    ia3.save_pretrained(tmp_path / "ia3")
    good = str(HOME / "experts" / "0")
    cached = base_model()
    cached.config.use_cache = True
    for base, changes, says in [
        (cached, {}, "use_cache = False"),
        (base_model(), {"hidden_size": 8}, "hidden_size is 8, but the model's is 16"),
        (base_model(), {"adapters": {}}, "names no experts"),
        (base_model(), {"adapters": {"default": good}}, "expert called 'default'"),
        (base_model(), {"adapters": {"a": good, "b": str(tmp_path / "ia3")}}, "mixes LORA adapters"),
        (base_model(), {"adapters": {"a": good, "b": "/nowhere"}}, "nowhere"),
        (base_model(), {"adapters": saved_head(tmp_path)}, "modules_to_save cannot be an expert"),
        (base_model(), {"top_k_lora": 5}, "top_k_lora=5 is more than the 2 experts."),
    ]:
        keys = list(base.state_dict())
        with pytest.raises(ValueError, match=says):
            peft.get_peft_model(base, config(**changes))
        assert list(base.state_dict()) == keys and all(p.requires_grad for p in base.parameters())
        assert not getattr(base, "peft_config", {})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"xlora_depth": 0}, "xlora_depth must be at least 1"),
        ({"xlora_dropout_p": 1.5}, "xlora_dropout_p must be"),
        ({"top_k_lora": 0}, "top_k_lora must be at least 1"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must be above 0"),
        ({"adapters": ["a"]}, "adapters must be"),
    ],
)
def test_config_names_the_wrong_field(changes, says):
    with pytest.raises(ValueError, match=says):
        config(**changes)


def test_config_warns_of_what_is_left_out():
    with pytest.warns(UserWarning, match="hidden_size"), pytest.warns(UserWarning, match="adapters"):
        assert (peft.XLoraConfig().hidden_size, peft.XLoraConfig().adapters) == (4096, {})
    with pytest.warns(UserWarning, match="enable_softmax_topk"):
        config(enable_softmax_topk=True, top_k_lora=1)
