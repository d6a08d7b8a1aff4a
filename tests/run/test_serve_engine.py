"""Continuous batching: every answer is the one that the request would get alone."""

import copy
import functools
import random
import time

import pytest
import torch
from serving import ADAPTERS, Collect, finish, make_adapter, make_adapters

import peft
from peft_run.serve.adapters import AdapterRefused, Adapters, NoRoom, UnknownAdapter, inspect
from peft_run.serve.cache import SlotCache
from peft_run.serve.engine import Engine, Request
from peft_run.serve.sampling import Sampling, choose
from peft_run.serve.text import Text
from peft_run.serve.worker import Busy


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(model, tokenizer, {name: folder})"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = make_adapters(tiny, tmp_path_factory.mktemp("adapters"))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny), folders


def adapters_on(model, folders):
    found = Adapters(model)
    for name, folder in folders.items():
        found.learn(inspect(name, folder, 4))
    return found


@pytest.fixture
def adapters(world):
    model, _, folders = world
    found = adapters_on(model, folders)
    yield found
    for name in list(found.known):
        found.remove(name)
    assert found.model is model


def requests_of(seed, count):
    """Requests that differ in all that a request can differ in."""
    rng = random.Random(seed)
    for i in range(count):
        yield {
            "prompt": [rng.randrange(3, 250) for _ in range(rng.choice([1, 3, 9, 40]))],
            "max_tokens": rng.randrange(1, 30),
            "adapter": rng.choice([None, *ADAPTERS]),
            "sampling": Sampling(rng.choice([0.0, 0.8]), rng.choice([1.0, 0.9]), seed=i),
            "stop_ids": rng.choice([(), (rng.randrange(3, 250), rng.randrange(3, 250))]),
            "stops": rng.choice([(), (chr(rng.randrange(97, 123)),)]),
            "logprobs": rng.choice([None, 0, 2]),
        }


@functools.lru_cache(maxsize=16)
def through_the_library(base, folder):
    from transformers import AutoModelForCausalLM

    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if folder is None else PeftModel.from_pretrained(model, folder)).eval()


def alone(world, settings):
    """The request through the plain library: no batch, no cache of ours, the whole text read anew for each token."""
    shared, tokenizer, folders = world
    model = through_the_library(shared.name_or_path, folders[settings["adapter"]] if settings["adapter"] else None)
    generator, tokens = settings["sampling"].generator(), list(settings["prompt"])
    answer, text = [], Text(tokenizer, settings["stops"])
    while len(answer) < settings["max_tokens"] and not text.stopped:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        token = choose(logits, int(logits.argmax()), settings["sampling"], generator, None).token
        if token in settings["stop_ids"]:
            break
        answer.append(token)
        tokens.append(token)
        text.add(token)
    return answer


@pytest.mark.parametrize("packed", [False, True])
def test_requests_that_join_and_leave_get_what_they_get_alone(world, adapters, packed):
    if packed:
        model = copy.deepcopy(world[0])
        assert peft.pack_linears(model)
        adapters = adapters_on(model, world[2])
    engine = Engine(adapters, world[1], slots=4, queue=100)  # not started: the test makes its steps
    asked = [(settings, Collect()) for settings in requests_of(0, 24)]
    rng, waiting = random.Random(1), list(asked)
    while waiting or engine.waiting or engine.reading or engine.running:
        for settings, sink in [waiting.pop() for _ in range(min(len(waiting), rng.randrange(3)))]:
            engine.waiting.append(Request(**settings, sink=sink))
        with torch.inference_mode():
            engine.step()
    assert engine.metrics.values["step_rows_total"] > 2 * engine.metrics.values["steps_total"]
    for settings, sink in asked:
        assert sink.error is None
        assert sink.tokens == alone(world, settings)
    assert not any(entry.users for entry in adapters.held.values())


def test_adapters_make_a_difference(world):
    """Else the test above would hold for a server that always takes the same adapter."""
    settings = {**next(requests_of(0, 1)), "sampling": Sampling(), "stop_ids": (), "stops": (), "max_tokens": 8}
    answers = [alone(world, {**settings, "adapter": name}) for name in [None, *ADAPTERS]]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_a_cancelled_request_frees_its_slot_and_others_do_not_notice(world, adapters):
    engine = Engine(adapters, world[1], slots=3)
    settings = [{**s, "max_tokens": 20, "stop_ids": (), "stops": ()} for s in requests_of(3, 3)]
    sinks = [Collect() for _ in settings]
    requests = [Request(**s, sink=sink) for s, sink in zip(settings, sinks)]
    engine.waiting.extend(requests)
    with torch.inference_mode():
        for _ in range(6):
            engine.step()
        assert len(engine.running) == 3
        engine.cancel(requests[0])
        engine.step()
        assert requests[0] not in engine.running and engine.cache.rows == 2
        while engine.running:
            engine.step()
    for s, sink in list(zip(settings, sinks))[1:]:
        assert sink.tokens == alone(world, s)


def test_a_full_queue_says_so_and_takes_all_or_none(world, adapters):
    engine = Engine(adapters, world[1], slots=1, queue=2).start()
    done, started = [], []
    blocker = engine.call(lambda: (started.append(1), time.sleep(0.3)))
    while not started:
        time.sleep(0.01)
    settings = next(requests_of(0, 1))
    sinks = [Collect(), Collect()]
    engine.submit(*(Request(**settings, sink=sink) for sink in sinks))
    with pytest.raises(Busy):
        engine.submit(Request(**settings, sink=done.append))
    blocker.result()
    assert finish(engine, sinks) and not done
    assert sinks[0].tokens == sinks[1].tokens == alone(world, settings)


def test_a_replaced_adapter_answers_at_once_and_running_requests_keep_theirs(world, adapters, tmp_path):
    model, tokenizer, folders = world
    engine = Engine(adapters, tokenizer, slots=4)
    settings = {"prompt": [5, 6, 7], "max_tokens": 12, "adapter": "one"}
    old, new = Collect(), Collect()
    with torch.inference_mode():
        engine.waiting.append(Request(**settings, sink=old))
        for _ in range(4):
            engine.step()
        make_adapter(model.name_or_path, tmp_path / "new", seed=77)
        adapters.add(inspect("one", tmp_path / "new", 4))
        assert len(adapters.retired) == 1
        engine.waiting.append(Request(**settings, sink=new))
        while engine.waiting or engine.reading or engine.running:
            engine.step()
    plain = {"sampling": Sampling(), "stop_ids": (), "stops": (), **settings}
    assert old.tokens == alone(world, plain)
    assert new.tokens == alone((model, tokenizer, {**folders, "one": tmp_path / "new"}), plain)
    assert old.tokens != new.tokens
    assert not adapters.retired


def test_the_budget_holds_and_the_least_recently_used_goes(world):
    model, _, folders = world
    sources = [inspect(name, folders[name], 4) for name in ADAPTERS]
    adapters = Adapters(model, budget=sources[0].nbytes + sources[2].nbytes)
    for source in sources:
        adapters.learn(source)
    one = adapters.acquire("one")
    adapters.release(adapters.acquire("two"))
    adapters.release(one)
    adapters.release(adapters.acquire("one"))  # now `two` is the one used longest ago
    adapters.acquire("three")
    assert list(adapters.held) == ["one", "three"] and adapters.evictions == 1
    parameters = sum(p.nbytes for n, p in adapters.model.named_parameters() if "lora_" in n)
    assert parameters == adapters.nbytes() <= adapters.budget
    adapters.acquire("one")
    with pytest.raises(NoRoom):
        adapters.acquire("two")
    for entry in list(adapters.held.values()):
        adapters.release(entry)
        adapters.remove(entry.source.name)
    assert adapters.model is model


def test_what_cannot_be_served_is_refused_and_changes_nothing(world, adapters, tmp_path):
    from safetensors.torch import load_file, save_file

    model = world[0]
    adapters.acquire("one")
    before = {n: p.clone() for n, p in adapters.model.named_parameters()}
    for name in ("", "../x", "a/b", "__base__", "x" * 65, "a\0b", ".."):
        with pytest.raises(AdapterRefused):
            inspect(name, world[2]["one"], 4)
    make_adapter(model.name_or_path, tmp_path / "bad", seed=9)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    good = load_file(file)
    first = next(iter(good))
    for wrong in (
        {**good, first: torch.full_like(good[first], float("nan"))},
        {k: v for k, v in good.items() if k != first},
        {**good, "base_model.model.model.norm.weight": torch.zeros(32)},
        {f"x.{k}": v for k, v in good.items()},
    ):
        save_file(wrong, file)
        with pytest.raises(AdapterRefused):
            adapters.add(inspect("bad", tmp_path / "bad", 4))
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterRefused):
        inspect("bad", tmp_path / "bad", 4)
    after = dict(adapters.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    adapters.release(adapters.held["one"])
    with pytest.raises(UnknownAdapter):
        adapters.acquire("bad")


def test_files_that_changed_are_not_served_under_the_old_name(world, tmp_path):
    model = world[0]
    make_adapter(model.name_or_path, tmp_path / "x", seed=1)
    adapters = Adapters(model)
    adapters.learn(inspect("x", tmp_path / "x", 4))
    make_adapter(model.name_or_path, tmp_path / "x", seed=2)
    with pytest.raises(AdapterRefused, match="changed"):
        adapters.acquire("x")


def test_text_comes_whole_and_stop_strings_never_show(world):
    tokenizer = world[1]
    tokens = tokenizer("a中文 STOPPED", add_special_tokens=False)["input_ids"]
    text, parts = Text(tokenizer, ["STOP"]), []
    for token in tokens:
        parts.append(text.add(token))
        if text.stopped:
            break
    assert "".join(parts) == "a中文 " and "\ufffd" not in "".join(parts)
    assert {"中", "文"} <= set(parts)
    held = Text(tokenizer, ["STOP"])
    assert "".join([held.add(t) for t in tokenizer("a STO", add_special_tokens=False)["input_ids"]]) == "a "
    assert held.finish() == "STO"


def test_slots_reuse_columns_and_clean_what_others_left():
    def prompt(length, value):
        return [(torch.full((2, length, 4), value), torch.full((2, length, 4), value))]

    slots = SlotCache(2)
    slots.join(prompt(3, float("nan")))
    slots.leave(0)
    slots.join(prompt(2, 1.0))
    row = slots.join(prompt(70, 2.0))
    mask = slots.before_step()
    assert mask.sum(1).tolist() == [3, 71]
    keys, _ = slots.layers[0].update(torch.full((2, 2, 1, 4), 9.0), torch.zeros(2, 2, 1, 4))
    slots.after_step()
    assert keys.isfinite().all()
    assert keys[0, 0, :, 0].tolist() == [0.0] * 68 + [1, 1, 9] and keys[row, 0, :, 0].tolist() == [2.0] * 70 + [9]
    size = slots.size
    slots.leave(1)
    for _ in range(3 * size):  # one short row for a long time: columns of the row that left are used again
        slots.before_step()
        slots.layers[0].update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        slots.after_step()
        if slots.lengths[0] > 8:
            slots.lengths[0] = 8
    assert slots.size == size


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_prompts_read_together_or_from_shared_beginnings_are_answered_as_alone(world, adapters, budget, monkeypatch):
    from peft_run.serve import engine as engines

    monkeypatch.setattr(engines, "PIECE", 100)  # long prompts take several pieces, short ones share one
    engine = Engine(adapters, world[1], slots=8, queue=100, prefixes=budget)
    rng, begin = random.Random(5), [random.Random(4).randrange(3, 250) for _ in range(70)]
    asked = []
    for settings in requests_of(7, 20):
        shared = rng.choice([0, 30, 40, 70])
        own = [rng.randrange(3, 250) for _ in range(rng.choice([1, 2, 11, 60]))]
        asked.append(({**settings, "prompt": begin[:shared] + own, "max_tokens": 6}, Collect()))
    for i, (settings, sink) in enumerate(asked):
        engine.waiting.append(Request(**settings, sink=sink))
        if i in (4, 12, 19):
            with torch.inference_mode():
                while engine.waiting or engine.reading or engine.running:
                    engine.step()
    for settings, sink in asked:
        assert sink.error is None and sink.tokens == alone(world, settings)
    values = engine.metrics.values
    whole = sum(len(settings["prompt"]) for settings, _ in asked)
    assert values["prompt_forwards_total"] < len(asked)
    assert values["prompt_tokens_total"] + engine.prefixes.found == whole
    assert (engine.prefixes.found > 100) == bool(budget) and engine.prefixes.nbytes <= budget


def test_a_replaced_adapter_finds_nothing_of_the_old_ones_prefix(world, adapters, tmp_path):
    model, tokenizer, folders = world
    engine = Engine(adapters, tokenizer, prefixes=1 << 20)
    settings = {"prompt": list(range(3, 103)), "max_tokens": 8, "adapter": "one"}
    plain = {"sampling": Sampling(), "stop_ids": (), "stops": (), **settings}
    answers = []
    for seed in (None, None, 77, 77):
        if seed is not None:
            adapters.add(inspect("one", make_adapter(model.name_or_path, tmp_path / "new", seed=seed), 4))
        sink = Collect()
        engine.waiting.append(Request(**settings, sink=sink))
        with torch.inference_mode():
            while engine.waiting or engine.reading or engine.running:
                engine.step()
        answers.append(sink.tokens)
    found = engine.prefixes.found
    assert found == 2 * 96  # the second of each pair
    assert answers[0] == answers[1] == alone(world, plain)
    assert answers[2] == answers[3] == alone((model, tokenizer, {**folders, "one": tmp_path / "new"}), plain)


def test_prefixes_stay_in_their_budget_and_forget_what_was_used_longest_ago():
    from peft_run.serve.prefixes import BLOCK, Prefixes
    from peft_run.serve.reading import length, nbytes

    def past(tokens):
        return [(torch.tensor(tokens, dtype=torch.float32)[None, :, None].repeat(2, 1, 4),) * 2 for _ in range(3)]

    texts = [[i] * (3 * BLOCK) for i in range(3)]
    prefixes = Prefixes(2 * nbytes(past(texts[0])))
    prefixes.keep("d", texts[0], past(texts[0]))
    prefixes.keep("d", texts[1], past(texts[1]))
    assert length(prefixes.find("d", texts[0])) == 2 * BLOCK  # never the last token
    assert length(prefixes.find("d", [*texts[0], 1])) == 3 * BLOCK and not prefixes.find("other", texts[0])
    prefixes.keep("d", texts[2], past(texts[2]))
    assert prefixes.nbytes <= prefixes.budget
    assert length(prefixes.find("d", [*texts[0], 1])) == 3 * BLOCK and not prefixes.find("d", texts[1])
    found = prefixes.find("d", [*texts[2], 1])
    assert all(torch.equal(a, b) for one, other in zip(found, past(texts[2])) for a, b in zip(one, other))
    small = Prefixes(nbytes(past(texts[0])) // 2)
    small.keep("d", texts[0], past(texts[0]))
    assert length(small.find("d", [*texts[0], 1])) == BLOCK and small.nbytes <= small.budget


# -- prompt methods -------------------------------------------------------------------------------------------------


def prompt_adapter(model, folder, config):
    from transformers import AutoModelForCausalLM

    from peft import get_peft_model

    torch.manual_seed(11)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for parameter in tuned.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(world, tmp_path_factory):
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    root, model = tmp_path_factory.mktemp("prompts"), world[0].name_or_path
    size = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
    configs = {
        "tuning": PromptTuningConfig(**size),
        "p": PromptEncoderConfig(encoder_hidden_size=16, **size),
        "prefix": PrefixTuningConfig(**size),
    }
    return {name: prompt_adapter(model, root / name, config) for name, config in configs.items()}


def test_prompt_methods_share_batches_with_layers(world, adapters, prompts):
    model, tokenizer, folders = world
    for name, folder in prompts.items():
        adapters.learn(inspect(name, folder, 4))
        assert adapters.known[name].virtual == 5
    engine = Engine(adapters, tokenizer, slots=6, prefixes=1 << 20)
    asked = []
    for text in (list(range(3, 43)), [9, 8, 7], list(range(3, 43))):
        for name in ("one", *prompts, None):  # layers are adapted already when the prompts are loaded
            settings = {"prompt": text, "max_tokens": 8, "adapter": name, "sampling": Sampling()}
            asked.append(({**settings, "stop_ids": (), "stops": ()}, Collect()))
            engine.waiting.append(Request(**asked[-1][0], sink=asked[-1][1]))
    with torch.inference_mode():
        while engine.waiting or engine.reading or engine.running:
            engine.step()
    everywhere = (model, tokenizer, {**folders, **prompts})
    for settings, sink in asked:
        assert sink.error is None and sink.tokens == alone(everywhere, settings), settings["adapter"]
    assert len({tuple(sink.tokens) for _, sink in asked[:5]}) == 5
    assert engine.prefixes.found
    entry = adapters.held["tuning"]
    assert entry.nbytes == 5 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, dim, bytes


def test_a_prompt_that_cannot_be_served_is_refused_when_it_is_loaded(world, adapters, prompts, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(prompts["tuning"], tmp_path / "bad")
    tables = load_file(folder / "adapter_model.safetensors")
    for wrong in (torch.full_like(tables["prompt_embeddings"], float("nan")), torch.zeros(5, 7)):
        save_file({"prompt_embeddings": wrong}, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterRefused):
            adapters.add(inspect("bad", folder, 4))
    small = Adapters(world[0], budget=100)
    with pytest.raises(AdapterRefused, match="than the 100"):
        small.add(inspect("tuning", prompts["tuning"], 4))
