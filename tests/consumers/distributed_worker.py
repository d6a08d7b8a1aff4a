"""What each of two processes does in test_distributed.py; results go to the folder given."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))

import models
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

STEPS = 3


def build(**options):
    """The same PeftModel in every process."""
    base = models.build("llama")
    torch.manual_seed(0)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = get_peft_model(base, LoraConfig(**settings))
    models.perturb(model)
    return model.train()


def batches() -> list[torch.Tensor]:
    """Three batches of four rows."""
    return [((models.noise((4, 9), 10 + i) + 1) * 31).long() for i in range(STEPS)]


def optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def ddp(folder: Path) -> None:
    """Each process takes half of every batch."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    raw = build()
    model, optim = accelerator.prepare(raw, optimizer(raw))
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    for batch in batches():
        half = batch.chunk(2)[accelerator.process_index]
        accelerator.backward(model(input_ids=half, labels=half).loss)
        optim.step()
        optim.zero_grad()
    found = get_peft_model_state_dict(accelerator.unwrap_model(model))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / f"rank{accelerator.process_index}.safetensors")
    accelerator.unwrap_model(model).save_pretrained(
        str(folder / "adapter"), is_main_process=accelerator.is_main_process
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fsdp2(folder: Path) -> None:
    """Shard every layer and the root; all processes take the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = build()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = optimizer(model)
    losses = []
    for batch in batches():
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.detach())
    found = get_peft_model_state_dict(model)
    whole = {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).contiguous() for k, v in found.items()}
    if dist.get_rank() == 0:
        save_file({**whole, "losses": torch.stack(losses).float()}, folder / "fsdp2.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"ddp": ddp, "fsdp2": fsdp2}[sys.argv[1]](Path(sys.argv[2]))
