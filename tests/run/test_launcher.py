"""`peft train --launcher`: two real processes follow the curve of one, and write the same adapter."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load_file

from peft_run import cli, recipes
from peft_run.config import load
from peft_run.errors import UsageError
from peft_run.run import Run
from peft_run.train.launch import Shape, command, without_launcher
from peft_run.train.world import World

STEPS = 12


class TestCommandLine:
    def test_the_shape_is_that_of_the_environment(self):
        names = {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
        assert Shape.of(names) == Shape(4, 2, 1, "a", 7)
        torchrun = command("torchrun", Shape.of(names), ["--max_restarts=1"])
        assert torchrun[1:] == [
            *("-m", "torch.distributed.run", "--nproc_per_node=4", "--nnodes=2", "--node_rank=1"),
            *("--master_addr=a", "--master_port=7", "--max_restarts=1"),
        ]
        accelerate = command("accelerate", Shape.of(names), [])
        assert {"--num_processes=8", "--num_machines=2", "--machine_rank=1", "--main_process_ip=a"} <= set(accelerate)

    @pytest.mark.parametrize(
        "names",
        [
            {"NPROC_PER_NODE": "two"},
            {"NPROC_PER_NODE": "0"},
            {"NNODES": "2"},
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
        ],
    )
    def test_what_makes_no_sense_is_refused(self, names):
        with pytest.raises(UsageError, match=r"NPROC_PER_NODE|MASTER_ADDR|NODE_RANK"):
            Shape.of(names)

    def test_the_processes_get_the_command_without_the_launcher(self):
        assert without_launcher(["r.yaml", "--launcher", "torchrun", "-q"]) == ["r.yaml", "-q"]
        assert without_launcher(["--launcher=accelerate", "r.yaml"]) == ["r.yaml"]

    def test_a_wrong_recipe_is_refused_before_anything_starts(self, capsys):
        assert cli.main(["train", "nowhere.yaml", "--launcher", "torchrun"]) == 2
        assert cli.main(["train", "nowhere.yaml", "--", "--nnodes=2"]) == 2
        assert "--launcher" in capsys.readouterr().err

    def test_deepspeed_is_refused(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        (tmp_path / "r.yaml").write_text("model: {path: x}")
        assert cli.main(["train", str(tmp_path / "r.yaml")]) == 2
        assert "FSDP2" in capsys.readouterr().err

    def test_files_for_accelerate_are_read_by_accelerate(self):
        config_args = pytest.importorskip("accelerate.commands.config.config_args")
        for file in (recipes.find("multi-gpu") / "accelerate").glob("*.yaml"):
            assert config_args.load_config_from_file(str(file)).num_processes == 2


def test_every_sample_is_computed_once():
    """Also where a batch has fewer samples than there are processes: then the others keep step and do not count."""
    worlds = [World() for _ in range(4)]
    for rank, world in enumerate(worlds):
        world.rank, world.size = rank, 4
    for numbers in ([1, 2, 3], list(range(9)), [5]):
        parts = [world.part(numbers) for world in worlds]
        assert sorted(n for own, counts in parts if counts for n in own) == numbers
        assert all(own for own, _ in parts)


# -- real processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("launched")
    rows = [{"instruction": f"Say {n * 37 % 101}.", "output": "done" if n % 2 else "no"} for n in range(23)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"path": str(tiny), "dtype": "fp32"},
        "data": {"train": "data.jsonl", "eval": {"split": 0.2}},
        "train": {"steps": STEPS, "batch": 5, "accumulate": 2, "lr": 1e-2, "eval_every": 4, "save_every": 4},
        "output": {"dir": "runs"},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(settings))
    return folder / "r.yaml"


@pytest.fixture(scope="module")
def alone(recipe):
    from peft_run.train import train

    loaded = load(recipe, ["output.name=alone"])
    run = Run.create(loaded)
    train(run, loaded)
    return run


def curve(run):
    return [event["loss"] for event in run.events() if "loss" in event]


def held_out(run):
    return [event["eval_loss"] for event in run.events() if "eval_loss" in event]


def same(run, alone):
    """Curves to 1e-5 of their values; the adapter's numbers, of the order of 0.1, to 2e-5."""
    assert curve(run) == pytest.approx(curve(alone), rel=1e-5)
    assert held_out(run) == pytest.approx(held_out(alone), rel=1e-5)
    ours, theirs = (load_file(r / "adapter_model.safetensors") for r in (run, alone))
    assert ours.keys() == theirs.keys()
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours) < 2e-5
    provenance = [json.loads((r / "adapter_provenance.json").read_text()) for r in (run, alone)]
    assert provenance[0] == provenance[1]


WAYS = {
    "torchrun": ["--launcher", "torchrun"],
    "sharded": ["--launcher", "torchrun", "train.shard=true"],
    "accelerate": ["--launcher", "accelerate"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_where_one_does(way, recipe, alone, peft):
    done = peft("train", recipe.name, f"output.name={way}", *WAYS[way], "--json", cwd=recipe.parent, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["processes"] == 2 and result["steps"] == STEPS
    same(Run.open(result["run"]), alone)
    assert len(list((recipe.parent / "runs" / way).glob("2*"))) == 1


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(recipe, alone, peft, monkeypatch):
    import signal

    from peft_run.errors import Interrupted
    from peft_run.train import train
    from peft_run.train.progress import Progress

    loaded = load(recipe, ["output.name=half"])
    run = Run.create(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", lambda self, event: event["step"] == 5 and signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(run, loaded)
    done = peft("train", "--resume", run.path, "--launcher", "torchrun", cwd=recipe.parent, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert "Resumed from the checkpoint of step 5" in done.stderr
    same(run, alone)


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_command(recipe, peft):
    done = peft(
        "train", recipe.name, "train.lr=1e30", "train.clip=0", "output.name=hot", "--launcher=torchrun",
        cwd=recipe.parent, NPROC_PER_NODE="2",
    )  # fmt: skip
    assert done.returncode == 1 and "not finite" in done.stderr
    assert not list((recipe.parent / "runs" / "hot").glob("*/adapter_model.safetensors"))
