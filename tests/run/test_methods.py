"""Every method of the registry can be trained by its name, resumed to the last bit, and loaded from its run."""

from __future__ import annotations

import signal

import pytest
import torch
from test_train import CHATS, recipe_for, train_one

from peft import registry
from peft_run import artefact
from peft_run.errors import Interrupted, UsageError
from peft_run.run import Run
from peft_run.train import train
from peft_run.train.progress import Progress

# What does not follow from defaults on a model this small.
OPTIONS = {
    "ADALORA": {"init_r": 8, "target_r": 2, "tinit": 1, "tfinal": 0, "deltaT": 2},
    "ADAMSS": {"use_asa": True, "init_warmup": 2, "final_warmup": 8, "mask_interval": 2, "asa_target_subspaces": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "WAVEFT": {"n_frequency": 20},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
}
ELSEWHERE = {"FUSION", "XLORA"}  # made of adapters that must be there first
STATEFUL = ("LORA", "ADALORA", "ADAMSS", "VERA", "OFT", "PREFIX_TUNING", "OSF", "FULL")


def settings(name, **train):
    adapter = {"method": name.lower(), "options": OPTIONS.get(name, {})}
    return {"adapter": adapter, "train": {"steps": 10, "lr": 2e-3, "eval_every": 5, **train}, "track": {"plots": False}}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(registry.names() - ELSEWHERE), "FULL"])
def test_trained_and_loaded_by_name(tmp_path, tiny, name):
    from test_train import tuned_samples

    from peft_run.console import silent

    run, result = train_one(tmp_path, tiny, CHATS, **settings(name))
    assert result["trainable"] > 0
    tuned = artefact.load(run)
    batch = tuned.task.collate(tuned.task.encode_all(tuned_samples(run), silent(), training=False))
    with torch.no_grad():
        loss = tuned.task.score(tuned.model, batch)["loss"] / batch["units"]
    assert loss == pytest.approx(result["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("name", STATEFUL)
def test_resumed_to_the_last_bit(tmp_path, tiny, monkeypatch, name):
    recipe = recipe_for(tmp_path, tiny, CHATS, **settings(name, keep="last"))
    tensors = []
    for stop_at in (None, 6):
        run = Run.create(recipe)
        if stop_at is not None:
            with monkeypatch.context() as patch:
                patch.setattr(
                    Progress, "step", lambda self, event: event["step"] == 6 and signal.raise_signal(signal.SIGINT)
                )
                with pytest.raises(Interrupted):
                    train(run, recipe)
        train(run, recipe, resume=stop_at is not None)
        last = run / "checkpoint-10"
        tensors.append([(last / name).read_bytes() for name in ("trained.safetensors", "optimizer.safetensors")])
    assert tensors[0] == tensors[1]


def test_settings_that_a_method_does_not_have_are_refused(tmp_path, tiny):
    for adapter, says in (
        ({"method": "lorra"}, "`lora`"),
        ({"method": "ia3", "r": 4}, "adapter.r"),
        ({"options": {"use_drora": True}}, "use_dora"),
    ):
        with pytest.raises(UsageError, match=says):
            train_one(tmp_path, tiny, CHATS, adapter=adapter)


def test_trained_heads_of_a_half_precision_base_are_float32(tmp_path, tiny):
    from test_train import REVIEWS

    run, _ = train_one(tmp_path, tiny, REVIEWS, task="seq_cls", model={"dtype": "bf16"}, train={"steps": 2})
    from safetensors.torch import load_file

    for name, tensor in load_file(run.checkpoints()[-1] / "trained.safetensors").items():
        assert tensor.dtype == torch.float32, name
    assert artefact.load(run).info["dtype"] == "bfloat16"


def test_checkpointed_activations_change_no_loss(tmp_path, tiny):
    results = [
        train_one(tmp_path, tiny, CHATS, train={"steps": 3, "grad_checkpoint": flag})[1] for flag in (False, True)
    ]
    assert results[0]["loss_last"] == pytest.approx(results[1]["loss_last"], rel=1e-6)
