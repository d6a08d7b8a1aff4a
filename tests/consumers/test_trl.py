"""TRL's trainers with a PEFT configuration or a PeftModel."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from helpers import changed, chat_llama, snapshot, tiny_tokenizer
from safetensors.torch import load_file

from peft import LoraConfig, PeftModel, get_peft_model

trl = pytest.importorskip("trl")

QUESTIONS = ["hi", "how are you", "what is two and two", "name a colour"]
ANSWERS = ["hello", "well, thank you", "four", "blue"]


def lora(**changes):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **changes})


def settings(folder, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
    }
    return {**options, **changes}


def chats() -> Dataset:
    pairs = zip(QUESTIONS, ANSWERS)
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return Dataset.from_dict({"messages": rows})


def preferences() -> Dataset:
    say = [[{"role": "user", "content": q}] for q in QUESTIONS]
    good = [[{"role": "assistant", "content": a}] for a in ANSWERS]
    bad = [[{"role": "assistant", "content": a[::-1]}] for a in ANSWERS]
    return Dataset.from_dict({"prompt": say, "chosen": good, "rejected": bad})


def check_trained(trainer, folder, base):
    """Only the adapter moved, and the saved folder gives the trained model back."""
    model = trainer.model
    assert isinstance(model, PeftModel)
    original = base.state_dict()
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, original[name.replace(".base_layer", "")]), name
    trainer.save_model(str(folder))
    assert all(".ref" not in key for key in load_file(folder / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(chat_llama(), str(folder)).eval()
    ids = torch.arange(6, 26).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
        assert (again(ids).logits - base(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("wrapped", [False, True])
def test_sft(tmp_path, wrapped):
    model = get_peft_model(chat_llama(), lora()) if wrapped else chat_llama()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=chats(),
        processing_class=tiny_tokenizer(),
        peft_config=None if wrapped else lora(),
    )
    before = snapshot(trainer.model, True)
    trainer.train()
    assert len(before) == 8
    assert set(changed(before, trainer.model)) == set(before)
    check_trained(trainer, tmp_path / "saved", chat_llama())


@pytest.mark.parametrize("wrapped", [False, True])
def test_dpo_takes_the_disabled_adapter_as_reference(tmp_path, wrapped):
    model = get_peft_model(chat_llama(), lora()) if wrapped else chat_llama()
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path, beta=0.5)),
        train_dataset=preferences(),
        processing_class=tiny_tokenizer(),
        peft_config=None if wrapped else lora(),
    )
    before = snapshot(trainer.model, True)
    trainer.train()
    assert set(changed(before, trainer.model)) == set(before)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    # The untrained policy equals its reference, so the first loss is log 2; later the two must differ.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 1e-3
    check_trained(trainer, tmp_path / "saved", chat_llama())


def test_dpo_on_a_trained_adapter_keeps_it_as_reference(tmp_path):
    """Given a trained PeftModel, the reference is that adapter and not the bare base model."""
    model = get_peft_model(chat_llama(), lora(init_lora_weights=False))
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path, beta=0.5)),
        train_dataset=preferences(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 1e-3
