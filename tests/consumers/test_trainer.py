"""transformers' Trainer on a PeftModel: saving, resuming, keeping the best, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from helpers import changed, snapshot
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

ROWS = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(9).add(i * 5) % 60 + 3 for i in range(8))]


def wrapped(base=None, **changes):
    base = models.build("llama") if base is None else base
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **changes}
    return get_peft_model(base, LoraConfig(**options))


def trainer(model, folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    args = TrainingArguments(**{**settings, **changes})
    return Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS)


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def test_trains_saves_and_resumes(tmp_path):
    model = wrapped(modules_to_save=["norm"])
    frozen, before = snapshot(model, False), snapshot(model, True)
    run = trainer(model, tmp_path / "whole")
    run.train()
    assert not changed(frozen, model)
    assert set(changed(before, model)) == set(before)
    first = tmp_path / "whole" / "checkpoint-2"
    assert (first / "adapter_model.safetensors").exists()
    assert not list(first.glob("model*.safetensors")), "a checkpoint must not hold the base model"

    again = wrapped(modules_to_save=["norm"])
    resumed = trainer(again, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(first))
    assert losses(resumed)[-2:] == losses(run)[-2:]
    for name, value in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(get_peft_model_state_dict(again)[name], value, rtol=0, atol=0, msg=name)


def test_resumes_with_several_adapters(tmp_path):
    model = wrapped()
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], init_lora_weights=False))
    models.perturb(model)
    trainer(model, tmp_path, max_steps=2).train()
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert (tmp_path / "checkpoint-2" / "other" / "adapter_model.safetensors").exists()

    torch.manual_seed(9)
    again = wrapped()
    again.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], init_lora_weights=False))
    run = trainer(again, tmp_path, max_steps=2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not changed(saved, again)


def test_loads_the_best_checkpoint_at_the_end(tmp_path):
    model = wrapped(lora_dropout=0.0)
    run = trainer(
        model,
        tmp_path,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so this makes the first checkpoint the "best"
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    found = get_peft_model_state_dict(model)
    kept, last = (load_file(tmp_path / f"checkpoint-{i}" / "adapter_model.safetensors") for i in (1, 4))
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert not all(torch.equal(kept[key], last[key]) for key in kept)
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_trains_a_plain_model_with_an_added_adapter(tmp_path):
    model = models.build("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="default")
    before = snapshot(model, True)
    trainer(model, tmp_path, max_steps=2).train()
    assert set(changed(before, model)) == set(before)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def gradients(model, reentrant: bool | None) -> dict[str, torch.Tensor]:
    """Gradients of one step; `None` means without checkpointing."""
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    torch.manual_seed(1)
    ids = models.inputs("llama")["input_ids"]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, before):
    wanted = gradients(wrapped(init_lora_weights=False), None)
    base = models.build("llama")
    if before:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(wrapped(base, init_lora_weights=False), None if before else reentrant)
    assert len(wanted) == 8
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_trainer_turns_on_gradient_checkpointing(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = wrapped(lora_dropout=0.0)
        run = trainer(model, tmp_path, max_steps=3, save_strategy="no", gradient_checkpointing=checkpointing)
        run.train()
        results.append(losses(run))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
