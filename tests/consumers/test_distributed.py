"""Two gloo processes: data parallel through accelerate, and FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from helpers import offline, python
from safetensors.torch import load_file

from peft import PeftModel, get_peft_model_state_dict

pytestmark = pytest.mark.slow


def launch(task: str, folder: Path) -> None:
    script = str(Path(worker.__file__))
    runner = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]
    python(*runner, script, task, str(folder), env=offline(ACCELERATE_USE_CPU="true"), interpreter=sys.executable)


@pytest.fixture(scope="module")
def single():
    """The losses and the adapter of one process with whole batches."""
    model = worker.build()
    optim = worker.optimizer(model)
    start = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    losses = []
    for batch in worker.batches():
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    found = get_peft_model_state_dict(model)
    assert all((found[k] - v).abs().max() > 1e-3 for k, v in start.items()), "training must move every tensor"
    return losses, found


def close(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value.detach(), atol=1e-5, rtol=1e-4, msg=key)


def test_data_parallel_equals_one_process_with_the_whole_batch(tmp_path, single):
    launch("ddp", tmp_path)
    ranks = [load_file(tmp_path / f"rank{i}.safetensors") for i in (0, 1)]
    assert set(ranks[0]) == set(ranks[1])
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    close(ranks[0], single[1])
    model = PeftModel.from_pretrained(worker.models.build("llama"), str(tmp_path / "adapter"))
    close(get_peft_model_state_dict(model), single[1])


def test_fsdp2_equals_unsharded(tmp_path, single):
    launch("fsdp2", tmp_path)
    found = load_file(tmp_path / "fsdp2.safetensors")
    assert found.pop("losses").tolist() == pytest.approx(single[0], rel=1e-5)
    close(found, single[1])
