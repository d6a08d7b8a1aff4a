"""Many threads on one model, each with its own adapter: every answer must be the right one.

The adapters are far apart, so that a wrong one shows; the interpreter switches threads as often as it can.
"""

from __future__ import annotations

import sys
import threading
import warnings

import models
import pytest
import torch

import peft

THREADS, ADAPTERS = 8, 8
NAMES = [f"a{i}" for i in range(ADAPTERS)]


@pytest.fixture(autouse=True)
def eager_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)


def many(base, **options):
    """A model with ADAPTERS adapters whose outputs differ plainly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **options), adapter_name=NAMES[0])
        for name in NAMES[1:]:
            model.add_adapter(name, peft.LoraConfig(r=2, **options))
    fill(model, NAMES)
    return model.eval()


@torch.no_grad()
def fill(model, names):
    """Distinct values for every adapter."""
    from peft.core.checkpoint import adapter_slots

    for i, name in enumerate(names):
        for j, slot in enumerate(adapter_slots(model, name)):
            slot.tensor.copy_(models.noise(slot.tensor.shape, 1000 * i + j))


def together(jobs, seconds=2.0, rounds=None):
    """Run jobs, each in its own thread and over and over; raise the first error of any; return the rounds done."""
    errors, done, stop, start = [], [0] * len(jobs), threading.Event(), threading.Barrier(len(jobs))

    def work(i, job):
        try:
            start.wait()
            while not stop.is_set() and (rounds is None or done[i] < rounds):
                job(done[i])
                done[i] += 1
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(i, job), daemon=True) for i, job in enumerate(jobs)]
    for t in threads:
        t.start()
    if rounds is None:
        stop.wait(seconds)
        stop.set()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads), "threads hang"
    if errors:
        raise errors[0]
    return done


def same(found, wanted, what):
    """Fails unless an answer is the expected one; another adapter's is 1000 times further away."""
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    assert difference < 1e-5, f"{what}: {difference}"


def solo(model, x):
    """The answer of each adapter, and of the base, computed alone."""
    with torch.no_grad():
        answers = {n: model(x, adapter_names=[n] * len(x)).logits.clone() for n in [*NAMES, "__base__"]}
    values = list(answers.values())
    for i, a in enumerate(values):
        for b in values[:i]:
            assert (a - b).abs().max() > 1e-2
    return answers


def reloading(model, folder, adapters=3):
    """A job that loads further adapters and deletes them."""
    model.save_pretrained(folder, selected_adapters=NAMES[:1])

    def job(k):
        name = f"extra{k % adapters}"
        model.load_adapter(folder / NAMES[0], name)
        model.delete_adapter(name)

    return job


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_forward_with_loading_and_deleting(grad, tmp_path):
    model = many(models.llama(), **LLAMA)
    ids = models.inputs("llama")["input_ids"]
    wanted = solo(model, ids)
    plain = model(ids).logits.detach()

    def asks_for_one(name):
        def job(k):
            with torch.set_grad_enabled(grad):
                same(model(ids, adapter_names=[name] * len(ids)).logits, wanted[name], name)

        return job

    def asks_for_two(i):
        def job(k):
            a, b = NAMES[(i + k) % ADAPTERS], [*NAMES, "__base__"][(3 * i + 5 * k) % (ADAPTERS + 1)]
            with torch.set_grad_enabled(grad):
                y = model(ids, adapter_names=[a, b]).logits
            same(y[0], wanted[a][0], a)
            same(y[1], wanted[b][1], b)

        return job

    def asks_plainly(k):
        with torch.set_grad_enabled(grad):
            same(model(ids).logits, plain, "plain")

    jobs = [asks_for_one(NAMES[0]), asks_for_one(NAMES[3]), asks_for_one("__base__")]
    jobs += [asks_for_two(i) for i in range(THREADS - 4)] + [asks_plainly, reloading(model, tmp_path)]
    assert len(jobs) == THREADS + 1
    done = together(jobs, seconds=2.5)
    assert min(done) >= 3, done
    assert list(model.peft_config) == NAMES and model.active_adapters == NAMES[:1]
    with torch.no_grad():
        same(model(ids).logits, plain, "afterwards")
    assert not model.state.calls


def test_generate_with_loading_and_deleting(tmp_path):
    model = many(models.llama(), **LLAMA)
    ids = models.inputs("llama")["input_ids"]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def answer(names):
        return model.generate(input_ids=ids, adapter_names=names, **how)

    wanted = {n: answer([n] * len(ids)) for n in NAMES}
    assert len({tuple(t.flatten().tolist()) for t in wanted.values()}) == ADAPTERS
    plain = model.generate(input_ids=ids, **how)

    def job(i):
        def run(k):
            a, b = NAMES[i], NAMES[(i + k) % ADAPTERS]
            found = answer([a, b])
            assert torch.equal(found[0], wanted[a][0]), a
            assert torch.equal(found[1], wanted[b][1]), b

        return run

    def plainly(k):
        assert torch.equal(model.generate(input_ids=ids, **how), plain)

    done = together([*(job(i) for i in range(THREADS)), plainly, reloading(model, tmp_path)], seconds=4.0)
    assert min(done) >= 1, done


def weight_patching(kind):
    """A base whose module reads its own weight, the options that adapt it, and its input."""
    if kind == "attention":
        return models.fill(models.Attention()), {"target_modules": ["mha", "head"]}, "attention"
    both = ["experts.w1", "experts.w2"]
    return models.fill(models.Parameters()), {"target_modules": [], "target_parameters": both}, "parameters"


@pytest.mark.parametrize("kind", ["attention", "parameters"])
def test_layers_that_read_their_own_weight(kind):
    """They are changed for the time of a forward: no other thread may see that, not even one that asks for the base."""
    base, options, name = weight_patching(kind)
    model = many(base, **options)
    x = models.inputs(name)["x"]
    with torch.no_grad():
        wanted = {n: model(x, adapter_names=n).clone() for n in [*NAMES, "__base__"]}
        plain = model(x)

    def job(n):
        def run(k):
            with torch.no_grad():
                same(model(x, adapter_names=n), wanted[n], n)

        return run

    def plainly(k):
        with torch.no_grad():
            same(model(x), plain, "plain")

    done = together([*(job(n) for n in NAMES[:4]), job("__base__"), job("__base__"), plainly], seconds=2.0)
    assert min(done) >= 3, done


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_variants_keep_their_caches_apart(options):
    model = many(models.fill(models.Mlp()), target_modules=["lin0", "lin1"], **options)
    x = models.inputs("mlp")["x"]
    with torch.no_grad():
        wanted = {n: model(x, adapter_names=n).clone() for n in NAMES}

    def job(i):
        def run(k):
            names = [NAMES[(i + k + j) % ADAPTERS] for j in range(len(x))]
            with torch.no_grad():
                y = model(x, adapter_names=names)
            for j, n in enumerate(names):
                same(y[j], wanted[n][j], n)

        return run

    assert min(together([job(i) for i in range(THREADS)], seconds=2.0)) >= 3


def test_bases_shared_by_two_models_do_not_mix_their_records(tmp_path):
    """Each model has its own record, also where a thread goes from one to the other."""
    one, two = (many(models.fill(models.Mlp()), target_modules=["lin0"]) for _ in range(2))
    x = models.inputs("mlp")["x"]
    with torch.no_grad():
        wanted = {n: one(x, adapter_names=n).clone() for n in NAMES}

    def job(i):
        def run(k):
            with torch.no_grad():
                same(one(x, adapter_names=NAMES[i]), wanted[NAMES[i]], "one")
                same(two(x, adapter_names=NAMES[i - 1]), wanted[NAMES[i - 1]], "two")

        return run

    assert min(together([job(i) for i in range(4)], seconds=1.0)) >= 3


def test_a_call_within_a_call_ends_where_it_began():
    """A hook that calls the model again, with another adapter, leaves the outer call its own."""
    model = many(models.fill(models.Mlp()), target_modules=["lin0", "lin1"])
    x = models.inputs("mlp")["x"]
    with torch.no_grad():
        wanted = {n: model(x, adapter_names=n).clone() for n in NAMES}
        inner = []
        layer = model.base_model.layers["lin0"]

        def hook(module, args, output):
            if not inner:
                inner.append(None)
                inner.append(model(x, adapter_names="a5").clone())

        handle = layer.register_forward_hook(hook)
        outer = model(x, adapter_names="a2")
        handle.remove()
    same(outer, wanted["a2"], "outer")
    same(inner[1], wanted["a5"], "inner")


def test_a_failed_call_leaves_no_trace():
    model = many(models.fill(models.Mlp()), target_modules=["lin0", "lin1"])
    x = models.inputs("mlp")["x"]
    with torch.no_grad():
        plain = model(x)
        with pytest.raises(RuntimeError):
            model(x[:, :3], adapter_names=["a3"] * len(x))
        same(model(x), plain, "after an error")
    assert not model.state.calls


def test_backward_in_another_thread_recomputes_what_its_forward_computed():
    """Checkpointing recomputes a forward in whatever thread runs backward."""
    model = many(models.llama(), **LLAMA)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = models.inputs("llama")["input_ids"]
    grads = []
    for elsewhere in (False, True):
        model.zero_grad()
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        for m in model.modules():  # checkpoints act in training mode only; `adapter_names` wants the model in eval
            m.__dict__["training"] = m is not model and "Llama" in type(m).__name__
        y = model(inputs_embeds=embeds, adapter_names=["a4"] * len(ids), use_cache=False).logits.square().sum()
        if elsewhere:
            thread = threading.Thread(target=y.backward)
            thread.start()
            thread.join()
        else:
            y.backward()
        grads.append(embeds.grad)
    plain = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.eval()
    model(inputs_embeds=plain, adapter_names=["a4"] * len(ids), use_cache=False).logits.square().sum().backward()
    same(grads[0], plain.grad, "same thread")
    same(grads[1], plain.grad, "other thread")


def test_registries_are_swapped_as_a_whole(tmp_path, monkeypatch):
    """A forward that walks a registry while another thread loads, or deletes, never meets a half-built one."""
    from peft.core import match

    model = many(models.fill(models.Mlp()), target_modules=["lin0", "lin1"])
    model.save_pretrained(tmp_path, selected_adapters=NAMES[:1])
    walk, sizes = match.walk, []

    def watched(base):
        for found in walk(base):
            sizes.append(len(model.base_model.layers))
            yield found

    monkeypatch.setattr(match, "walk", watched)
    model.load_adapter(tmp_path / NAMES[0], "more")
    model.delete_adapter("more")
    assert sizes and set(sizes) == {2}
