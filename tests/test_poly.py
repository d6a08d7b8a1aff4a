"""What the laws do not say of Poly: the tasks of a call, in forward, generate, mixed batches and recomputed layers."""

from __future__ import annotations

import threading

import models
import pytest
import torch
from models import noise

import peft
from peft import PolyConfig
from peft.errors import AdapterError, ConfigError

X = noise((6, models.WIDTH), 7)
TASKS = torch.tensor([2, 0, 1, 1, 0, 2])
LLAMA = models.inputs("llama")


def mlp(**config):
    """The MLP with three tasks, moved from the start."""
    options = {"r": 2, "n_tasks": 3, "n_skills": 2, "target_modules": ["lin0", "lin1"], **config}
    model = peft.get_peft_model(models.build("mlp"), PolyConfig(**options)).eval()
    models.perturb(model, scale=0.5)
    return model


def llama(**config):
    """A Llama with three tasks, moved from the start; always the same."""
    torch.manual_seed(0)
    options = {"r": 2, "n_tasks": 3, "n_skills": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(models.build("llama"), PolyConfig(**{**options, **config})).eval()
    models.perturb(model, scale=0.5)
    return model


@torch.no_grad()
def test_each_sample_is_computed_for_its_task():
    model = mlp()
    together = model(X, task_ids=TASKS)
    alone = torch.cat([model(x[None], task_ids=t[None]) for x, t in zip(X, TASKS)])
    torch.testing.assert_close(together, alone)
    one = model(X, task_ids=1)  # one for all
    torch.testing.assert_close(one[2:4], together[2:4])
    assert not torch.allclose(one[0], together[0])
    assert torch.equal(model(X, task_ids=TASKS.tolist()), together)
    assert torch.equal(model(X, task_ids=TASKS.int()), together)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "task_ids is missing.*forward or generate"),
        ([0, 1, 2, 3, 0, 1], "has the task 3, but adapter 'default' was made for 3"),
        ([0, 1, -1, 0, 0, 1], "must be at least 0, got -1"),
        ([0, 1, 2, 1], "has 4 tasks for 6 rows of lin0"),
        ([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], "must be whole numbers"),
        ([], "must be whole numbers"),
    ],
)
def test_calls_without_fitting_tasks_are_refused(tasks, message):
    model = mlp()
    with pytest.raises(AdapterError, match=message):
        model(X, task_ids=tasks)
    with model.disable_adapter():
        assert torch.equal(model(X), models.build("mlp")(X))
    model(X, task_ids=TASKS)  # and nothing of it stays


def test_wrong_settings_are_named():
    for name in ("r", "n_tasks", "n_skills", "n_splits"):
        with pytest.raises(ConfigError, match=f"PolyConfig.{name} must be at least 1"):
            PolyConfig(**{name: 0})
    with pytest.raises(ConfigError, match="n_splits=3 must divide the 16 inputs and 24 outputs of lin0"):
        mlp(n_splits=3)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generate_takes_tasks(beams):
    """Upstream's fails with beams."""
    model, how = llama(), {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "min_new_tokens": 6}
    ids = LLAMA["input_ids"]
    together = model.generate(input_ids=ids, task_ids=torch.tensor([0, 2]), **how)
    for i, task in enumerate([0, 2]):
        alone = model.generate(input_ids=ids[i : i + 1], task_ids=torch.tensor([task]), **how)
        assert torch.equal(together[i], alone[0])
    with pytest.raises(AdapterError, match="task_ids is missing"):
        model.generate(input_ids=ids, **how)


@torch.no_grad()
def test_encoder_and_decoder_take_tasks_also_with_beams():
    config = PolyConfig(r=2, n_tasks=3, n_skills=2, task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(models.build("t5"), config).eval()
    models.perturb(model, scale=0.5)
    ids, how = models.inputs("t5")["input_ids"], {"max_new_tokens": 4, "num_beams": 3}
    together = model.generate(input_ids=ids, task_ids=torch.tensor([0, 2]), **how)
    alone = model.generate(input_ids=ids[1:], task_ids=torch.tensor([2]), **how)
    assert torch.equal(together[1, : alone.shape[1]], alone[0])


@torch.no_grad()
def test_mixed_batches_keep_each_samples_task():
    model = mlp()
    model.add_adapter("b", PolyConfig(r=3, n_tasks=3, target_modules=["lin1"]))
    model.base_model.set_adapter("b")
    models.perturb(model, 9, scale=0.5)
    names = ["b", "default", "__base__", "default", "b", "b"]
    mixed = model(X, task_ids=TASKS, adapter_names=names)
    for i, name in enumerate(names):
        alone = model(X[i : i + 1], task_ids=TASKS[i : i + 1], adapter_names=[name])
        torch.testing.assert_close(mixed[i], alone[0])


def train_step(checkpointing=None):
    """Loss and gradients of one training step, whose skills are drawn at random."""
    model = llama(n_splits=2).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    torch.manual_seed(5)
    ids = LLAMA["input_ids"]
    loss = model(input_ids=ids, labels=ids, use_cache=False, task_ids=torch.tensor([2, 1])).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "poly_" in n}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_recomputed_layers_see_the_tasks_of_their_forward(reentrant):
    loss, wanted = train_step()
    found_loss, found = train_step(reentrant)
    assert torch.equal(loss, found_loss) and found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad)
    logits = wanted["base_model.model.model.layers.0.self_attn.q_proj.poly_router.default.module_logits"]
    assert logits[1:].any(dim=1).all() and not logits[0].any()  # tasks 2 and 1 learned, task 0 did not


def test_training_draws_skills_and_its_gradient_is_that_of_what_was_drawn():
    model = mlp(n_splits=2, target_modules=["lin0"]).double().train()
    x = X.double()

    def loss():
        torch.manual_seed(3)
        return model(x, task_ids=TASKS).square().sum()

    torch.manual_seed(4)
    assert not torch.equal(model(x, task_ids=TASKS), model(x, task_ids=TASKS))
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), trained)
    step, wanted = 1e-6, sum((g * noise(g.shape, i).double()).sum() for i, g in enumerate(grads))
    found = []
    with torch.no_grad():
        for sign in (1, -2):
            for i, p in enumerate(trained):
                p.add_(noise(p.shape, i).double(), alpha=sign * step)
            found.append(loss())
    assert abs((found[0] - found[1]) / (2 * step) - wanted) < 1e-4 * max(1, abs(wanted))


@torch.no_grad()
def test_threads_keep_their_tasks_apart():
    model, wrong = mlp(), []
    wanted = [model(X, task_ids=t) for t in range(3)]

    def work(task):
        wrong.extend(task for _ in range(200) if not torch.equal(model(X, task_ids=task), wanted[task]))

    threads = [threading.Thread(target=work, args=(t,)) for t in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
