"""`peft train` on a quantized base."""

import pytest
import torch
from test_train import CHATS, recipe_for, train_one

from peft_run import artefact
from peft_run.console import Console
from peft_run.deploy import probe
from peft_run.errors import UsageError
from peft_run.precision import compute_exactly
from peft_run.run import Run
from peft_run.train import train

pytest.importorskip("bitsandbytes")
STILL = {"lr": 1e-12, "steps": 1}  # nothing is learnt: the adapter stays as it started


def logits(run, *, adapter=True, **how):
    tuned = artefact.load(run, dtype=torch.float32, **how)
    compute_exactly(tuned.model)
    rows = probe.prompts(tuned)
    if adapter:
        return torch.cat(probe.logits(tuned.model, rows))
    with tuned.model.disable_adapter():
        return torch.cat(probe.logits(tuned.model, rows))


@pytest.mark.parametrize("task", ["causal_lm", "orpo"])
def test_loftq_starts_nearer_to_the_base_before_quantization(task, tmp_path, wide_tiny, capsys):
    rows = (
        CHATS
        if task == "causal_lm"
        else [{"prompt": r["instruction"], "chosen": "yes", "rejected": "no"} for r in CHATS]
    )
    quant = {"bits": 4, "loftq": True}
    recipe = recipe_for(tmp_path, wide_tiny, rows, task=task, model={"quant": quant}, train=STILL, adapter={"r": 32})
    run = Run.create(recipe)
    train(run, recipe, Console())
    assert "took away" in capsys.readouterr().err
    original, quantized = logits(run, adapter=False, quantized=False), logits(run, adapter=False)
    assert (logits(run) - original).norm() < 0.6 * (quantized - original).norm()


def test_loftq_where_it_makes_no_sense_is_refused(tmp_path, wide_tiny):
    quant = {"quant": {"loftq": True}}
    with pytest.raises(UsageError, match=r"loftq.*method ia3"):
        train_one(tmp_path, wide_tiny, CHATS, model=quant, adapter={"method": "ia3"})
    rows = [{"prompt": r["instruction"], "chosen": "yes", "rejected": "no"} for r in CHATS]
    with pytest.raises(UsageError, match=r"loftq.*task dpo"):
        train_one(tmp_path, wide_tiny, rows, task="dpo", model=quant)
