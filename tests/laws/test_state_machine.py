"""Any sequence of operations on a model against an oracle that keeps a dict of weight changes in float64."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from pathlib import Path

import models
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from laws_table import gap, peft_slots

import peft

NAMES = ["default", "b", "c", "d"]
LAYERS = ["lin0", "lin1"]
X = models.noise((5, models.WIDTH), 7)
a_name, a_rank = st.sampled_from(NAMES), st.integers(1, 4)
TARGETS = st.sampled_from([("lin0",), ("lin1",), ("lin0", "lin1")])


def config(rank, alpha, layers, rslora):
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), use_rslora=rslora)


class Machine(RuleBasedStateMachine):
    """`deltas[name][layer]` is what the oracle knows of an adapter; the model is never asked for it."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="peft-machine-"))
        self.base = models.fill(models.Mlp())
        self.plain = copy.deepcopy(self.base)
        self.weights = {n: self.plain.get_submodule(n).weight.detach().double() for n in LAYERS}
        self.model = None
        self.deltas, self.trained, self.saved = {}, {}, {}
        self.active, self.enabled, self.merged, self.seed = [], True, [], 0
        self.start("default", 2, 3, ("lin0", "lin1"), False)

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the oracle's part -------------------------------------------------------------------------------------
    def fill(self, name, rank, alpha, layers, rslora):
        """Give an adapter values that only this machine chooses."""
        self.seed += 1
        scale = alpha / (rank**0.5 if rslora else rank)
        self.deltas[name] = {}
        for layer in layers:
            out, inp = self.weights[layer].shape
            A, B = models.noise((rank, inp), self.seed * 10) * 0.5, models.noise((out, rank), self.seed * 10 + 1) * 0.5
            self.deltas[name][layer] = scale * B.double() @ A.double()
            held = self.model.base_model.layers[layer]
            with torch.no_grad():
                held.lora_A[name].weight.copy_(A)
                held.lora_B[name].weight.copy_(B)

    def acting(self):
        """Names of the adapters whose changes are in the output."""
        if not self.enabled:
            return []
        return [*self.merged, *(n for n in self.active if n not in self.merged)]

    def expected(self):
        weights = dict(self.weights)
        for name in self.acting():
            for layer, delta in self.deltas[name].items():
                weights[layer] = weights[layer] + delta
        h = torch.tanh(X.double() @ weights["lin0"].T + self.plain.lin0.bias.double())
        return h @ weights["lin1"].T + self.plain.lin1.bias.double()

    def start(self, name, rank, alpha, layers, rslora):
        self.model = peft.get_peft_model(self.base, config(rank, alpha, layers, rslora), adapter_name=name).eval()
        self.deltas, self.active, self.enabled, self.merged = {}, [name], True, []
        self.trained = {name: True}
        self.fill(name, rank, alpha, layers, rslora)

    # -- operations --------------------------------------------------------------------------------------------
    @rule(name=a_name, rank=a_rank, alpha=a_rank, layers=TARGETS, rslora=st.booleans())
    def add(self, name, rank, alpha, layers, rslora):
        chosen = config(rank, alpha, layers, rslora)
        if name in self.deltas:
            with pytest.raises(ValueError, match="already exists"):
                self.model.add_adapter(name, chosen)
            return
        self.model.add_adapter(name, chosen)
        self.trained[name] = True
        self.fill(name, rank, alpha, layers, rslora)

    @rule(name=a_name)
    def delete(self, name):
        if name not in self.deltas:
            with pytest.raises(ValueError, match="does not exist"):
                self.model.delete_adapter(name)
        elif name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
        else:
            self.model.delete_adapter(name)
            del self.deltas[name], self.trained[name]
            if name in self.active:
                self.active.remove(name)
                if not self.active:
                    self.active = list(self.deltas)[:1]
                self.merged = []  # switching unmerges

    @rule(name=a_name)
    def switch(self, name):
        if name not in self.deltas:
            with pytest.raises(ValueError, match="not found"):
                self.model.set_adapter(name)
            return
        self.model.set_adapter(name)
        self.active, self.merged = [name], []

    @rule()
    def switch_to_all(self):
        self.model.base_model.set_adapter(list(self.deltas))
        self.active, self.merged = list(self.deltas), []

    @rule(name=a_name, trained=st.booleans())
    def freeze(self, name, trained):
        if name in self.deltas:
            self.model.set_requires_grad(name, trained)
            self.trained[name] = trained

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        tuner = self.model.base_model
        (tuner.enable_adapter_layers if enabled else tuner.disable_adapter_layers)()
        self.enabled = enabled
        if not enabled:
            self.model(X)
            self.merged = []  # a disabled forward unmerges

    @precondition(lambda self: self.deltas)
    @rule(data=st.data())
    def merge(self, data):
        chosen = data.draw(st.none() | st.lists(st.sampled_from(sorted(self.deltas)), unique=True))
        self.model.merge_adapter(chosen)
        names = self.active if chosen is None else chosen
        self.merged += [n for n in names if n not in self.merged]
        if not self.enabled:
            self.model(X)
            self.merged = []

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @precondition(lambda self: self.deltas)
    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(sorted(self.deltas)))
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        self.saved[name] = dict(self.deltas[name])

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=a_name, trainable=st.booleans())
    def load(self, data, name, trainable):
        source = data.draw(st.sampled_from(sorted(self.saved)))
        if name in self.deltas:
            return
        folder = self.folder if source == "default" else self.folder / source
        self.model.load_adapter(folder, name, is_trainable=trainable)
        self.deltas[name], self.trained[name] = dict(self.saved[source]), trainable

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def reload(self, data):
        """A new process: the base from scratch, the adapter from its file."""
        source = data.draw(st.sampled_from(sorted(self.saved)))
        folder = self.folder if source == "default" else self.folder / source
        self.base = copy.deepcopy(self.plain)
        self.model = peft.PeftModel.from_pretrained(self.base, folder, adapter_name="b")
        self.deltas, self.trained = {"b": dict(self.saved[source])}, {"b": False}
        self.active, self.enabled, self.merged = ["b"], True, []

    @rule()
    def clone(self):
        self.model = copy.deepcopy(self.model)
        self.base = self.model.get_base_model()

    @rule(rank=a_rank, layers=TARGETS)
    def unload(self, rank, layers):
        base = self.model.unload()
        assert torch.equal(base(X), self.plain(X))
        assert [type(m) for m in base.modules()] == [type(m) for m in self.plain.modules()]
        self.base = base
        self.start("c", rank, 2, layers, False)

    @precondition(lambda self: self.deltas and not self.merged)
    @rule(data=st.data())
    def mixed(self, data):
        names = data.draw(st.lists(st.sampled_from([*self.deltas, "__base__"]), min_size=len(X), max_size=len(X)))
        before = (list(self.active), self.enabled)
        with torch.no_grad():
            y = self.model(X, adapter_names=names)
        for i, name in enumerate(names):
            self.active = [] if name == "__base__" else [name]
            assert gap(y[i], self.expected()[i]) < 1e-5
        self.active, self.enabled = before

    # -- what must hold after each of them -----------------------------------------------------------------------
    @invariant()
    def outputs_agree(self):
        with torch.no_grad():
            y = self.model(X)
        assert gap(y, self.expected()) < 1e-5
        if not any(self.deltas[n] for n in self.acting()):
            assert torch.equal(y, self.plain(X))

    @invariant()
    def records_agree(self):
        assert self.model.active_adapters == self.active
        assert list(self.model.peft_config) == list(self.deltas)
        layers = self.model.base_model.layers
        assert set(layers) == {n for d in self.deltas.values() for n in d}
        for path, layer in layers.items():
            assert set(layer.adapters) == {n for n, d in self.deltas.items() if path in d}
            assert layer.merged_adapters == [n for n in self.merged if path in self.deltas[n]]

    @invariant()
    def base_is_whole(self):
        if not self.merged:
            from peft.core.checkpoint import get_base_model_state_dict

            now = get_base_model_state_dict(self.model)
            assert all(torch.equal(v, now[k]) for k, v in self.plain.state_dict().items())

    @invariant()
    def nothing_frozen_is_trained(self):
        for name in self.deltas:
            grads = {s.tensor.requires_grad for s in peft_slots(self.model, name)}
            assert len(grads) == 1
            if not self.trained[name]:
                assert grads == {False}
        held = {id(s.tensor) for n in self.deltas for s in peft_slots(self.model, n)}
        assert not any(p.requires_grad for p in self.model.parameters() if id(p) not in held)


def run(examples, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hypothesis.stateful import run_state_machine_as_test

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None
            ),
        )


def test_any_sequence_of_operations():
    run(40, 25)


@pytest.mark.slow
def test_any_long_sequence_of_operations():
    run(600, 40)
