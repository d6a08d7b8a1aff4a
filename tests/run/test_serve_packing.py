"""`peft serve` keeps float32 weights in oneDNN's order where this processor then multiplies faster."""

import argparse

import pytest
import torch
from serving import Collect

from peft_run.console import silent
from peft_run.serve.engine import Request
from peft_run.serve.start import make_service

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SETTINGS = {"runs": [], "adapter": [], "pin": [], "served_name": None, "allow_runtime_lora": None, "device": "cpu"}
SETTINGS |= {"slots": 4, "queue": 8, "max_tokens": 256, "timeout": 60.0, "adapter_memory": None, "prefix_memory": 1}


def service_of(tiny, dtype="fp32", no_packing=False):
    more = {"base": str(tiny), "dtype": dtype, "no_packing": no_packing, "state": None, "console": silent()}
    return make_service(argparse.Namespace(**SETTINGS, **more), None)


def packed(service):
    return [m for m in service.model.modules() if type(m).__name__ == "PackedLinear"]


@pytest.fixture
def gain(monkeypatch):
    def say(value):
        monkeypatch.setattr("peft_run.precision.packing_gain", lambda: value)

    return say


def test_only_where_it_is_faster_and_not_forbidden(tiny, gain):
    gain(2.0)
    assert packed(service_of(tiny))
    assert not packed(service_of(tiny, no_packing=True))
    assert not packed(service_of(tiny, dtype="bf16"))
    gain(1.0)
    assert not packed(service_of(tiny))


def test_answers_stay_the_same(tiny, gain):
    answers = []
    for value in (1.0, 2.0):
        gain(value)
        service = service_of(tiny)
        sink = Collect()
        service.engine.start()
        service.engine.submit(Request(prompt=[5, 6, 7], max_tokens=12, sink=sink))
        assert service.engine.close(timeout=60)  # when all have their answers
        answers.append(sink.tokens)
    assert answers[0] == answers[1] and len(answers[0]) == 12


def test_the_gain_is_measured():
    from peft_run.precision import packing_gain

    assert 0.1 < packing_gain() < 50
