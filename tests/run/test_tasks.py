"""Every task: it learns, and its loss is the one of the formula."""

from __future__ import annotations

import math

import pytest
import torch
from test_train import CHATS, recipe_for, train_one
from transformers import AutoModel

from peft_run import artefact
from peft_run.base import load_base
from peft_run.console import silent
from peft_run.data.render import Renderer
from peft_run.tasks import make


def task_for(tmp_path, model, rows, name, **sections):
    from transformers import AutoTokenizer

    recipe = recipe_for(tmp_path, model, rows, task=name, **sections)
    return make(recipe, Renderer.of(recipe, AutoTokenizer.from_pretrained(model)), sections.pop("labels", []))


def encoded(task, samples):
    return task.collate(task.encode_all(samples, silent()))


# -- token_cls ------------------------------------------------------------------------------------------------------

TAGGED = [
    {"tokens": ["Ann", "met", name, "in", town], "tags": ["B-PER", "O", "B-PER", "O", "B-LOC"]}
    for name in ("Bob", "Eve", "Ida", "Tom")
    for town in ("Rome", "Oslo", "Kyiv")
]


def test_token_tags_are_learnt(tmp_path, tiny):
    run, result = train_one(tmp_path, tiny, TAGGED, task="token_cls", train={"epochs": 30, "lr": 2e-2})
    assert result["eval_accuracy"] > 0.9
    assert artefact.load(run).labels == ["B-LOC", "B-PER", "O"]


def test_a_tag_sits_on_the_first_piece_of_its_token_only(tmp_path, tiny):
    task = task_for(tmp_path, tiny, TAGGED, "token_cls")
    task.labels = ["B-LOC", "B-PER", "O"]
    (item,) = task.encode(TAGGED[0])
    pieces = [3, 3, 3, 2, 4]  # one per byte: Ann met Bob in Rome
    expected = []
    for tag, count in zip([1, 2, 1, 2, 0], pieces):
        expected += [tag, *[-100] * (count - 1)]
    assert list(item.labels) == expected


# -- qa -------------------------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "where?", "context": f"{'x' * i} at {town} {'y' * (20 - i)}", "answers": {"text": [town]}}
    for i in range(0, 20, 3)
    for town in ("Rome", "Oslo")
]


def test_spans_are_learnt(tmp_path, tiny):
    _, result = train_one(tmp_path, tiny, QUESTIONS, task="qa", train={"epochs": 30, "lr": 2e-2})
    assert result["loss_last"] < 0.5 * result["loss_first"]


@pytest.mark.parametrize("head", ["QuestionAnswering", "TokenClassification", "SequenceClassification", "CausalLM"])
def test_below_its_output_layer_a_model_has_the_weights_of_its_files(tmp_path, tiny, head):
    given = AutoModel.from_pretrained(tiny).state_dict()
    model = load_base(recipe_for(tmp_path, tiny, []), f"AutoModelFor{head}", torch.float32)
    body = model.base_model.state_dict()
    assert body.keys() == given.keys() and all(torch.equal(body[k], given[k]) for k in given)


def test_every_window_of_a_long_text_knows_whether_it_holds_the_answer(tmp_path, tiny):
    task = task_for(tmp_path, tiny, QUESTIONS, "qa", data={"max_length": 40})
    context = "a" * 50 + "Rome" + "b" * 50
    items = task.encode({"question": "where?", "context": context, "answer": "Rome", "start": 50})
    assert len(items) > 2 and all(item.length <= 40 for item in items)
    holding = [item for item in items if item.end]
    assert holding
    for item in holding:
        assert bytes(task.tokenizer.decode(item.ids[item.start : item.end + 1]), "utf-8") == b"Rome"


def test_the_best_span_never_ends_before_it_starts():
    from peft_run.tasks.qa import best_spans

    torch.manual_seed(0)
    start, end = torch.randn(5, 9), torch.randn(5, 9)
    for row, (first, last) in enumerate(best_spans(start, end)):
        pairs = [(0, 0), *[(i, j) for i in range(1, 9) for j in range(i, 9)]]
        assert (first, last) == max(pairs, key=lambda pair, row=row: float(start[row, pair[0]] + end[row, pair[1]]))


# -- seq2seq --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory, tiny):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "t5"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    config = T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_summary_is_learnt_from_an_encoder_and_a_decoder(tmp_path, tiny_t5):
    rows = [{"document": f"long {word} text", "summary": word} for word in ("aa", "bb", "cc", "dd") for _ in range(4)]
    run, result = train_one(tmp_path, tiny_t5, rows, task="seq2seq", train={"epochs": 20, "lr": 2e-2})
    assert result["loss_last"] < 0.5 * result["loss_first"]
    assert artefact.load(run).stop_ids == [2]


# -- preferences ----------------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"Say {i}.", "chosen": "yes", "rejected": "no way"} for i in range(12)]


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_the_better_answer_becomes_likelier(tmp_path, tiny, name):
    _, result = train_one(tmp_path, tiny, PAIRS, task=name, train={"epochs": 8, "lr": 5e-3})
    assert result["eval_accuracy"] == 1.0
    assert result["loss_last"] < result["loss_first"]


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_the_loss_is_the_papers(tmp_path, tiny, name):
    """Against the formula, with whole logits and in float64."""
    from transformers import AutoModelForCausalLM

    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    task = task_for(tmp_path, tiny, PAIRS, name)
    task.prepare(model)
    if name == "kto":
        samples = [
            {"messages": [{"role": "user", "content": c}], "completion": d, "good": e}
            for c, d, e in (("a", "bc", True), ("d", "e", False), ("f", "gh", True))
        ]
    else:
        samples = [
            {"messages": [{"role": "user", "content": c}], "chosen": d, "rejected": e}
            for c, d, e in (("a", "bc", "d"), ("ee", "f", "ghi"))
        ]
    items = task.encode_all(samples, silent())
    ours = task.loss(model, task.collate(items)).item()

    def log_p(prompt, answer, tuned):
        ids = task.renderer.prompt([{"role": "user", "content": prompt}])
        answer = task.tokenizer(answer)["input_ids"] + [2]
        with torch.no_grad():
            if tuned:
                logits = model(torch.tensor([ids + answer])).logits[0].double()
            else:
                with model.disable_adapter():
                    logits = model(torch.tensor([ids + answer])).logits[0].double()
        table = logits.log_softmax(-1)[len(ids) - 1 : -1]
        return [table[i, token].item() for i, token in enumerate(answer)]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    beta, expected = 0.1, 0.0
    content = [sample["messages"][0]["content"] for sample in samples]
    if name == "kto":

        def reward(prompt, answer):
            return sum(log_p(prompt, answer, True)) - sum(log_p(prompt, answer, False))

        answers = [sample["completion"] for sample in samples]
        other = [*content[1:], content[0]]
        z = max(0.0, sum(reward(p, a) for p, a in zip(other, answers)) / len(samples))
        for prompt, answer, sample in zip(content, answers, samples):
            sign = 1 if sample["good"] else -1
            expected += 1 - sigmoid(sign * beta * (reward(prompt, answer) - z))
    else:
        for prompt, sample in zip(content, samples):
            chosen, rejected = (log_p(prompt, sample[n], True) for n in ("chosen", "rejected"))
            if name == "dpo":
                old = [sum(log_p(prompt, sample[n], False)) for n in ("chosen", "rejected")]
                expected -= math.log(sigmoid(beta * (sum(chosen) - old[0] - sum(rejected) + old[1])))
            else:
                means = [sum(part) / len(part) for part in (chosen, rejected)]
                odds = [mean - math.log(1 - math.exp(mean)) for mean in means]
                expected += -means[0] - beta * math.log(sigmoid(odds[0] - odds[1]))
    assert ours == pytest.approx(expected, rel=1e-4)


# -- causal_lm ------------------------------------------------------------------------------------------------------


def test_the_short_way_gives_the_models_own_loss_and_gradients(tmp_path, tiny):
    """Losses and gradients from hidden states, chunk by chunk, against transformers' own, also with a trained head."""
    from transformers import AutoModelForCausalLM

    from peft import LoraConfig, get_peft_model

    for targets in ("all-linear", ["q_proj", "lm_head"]):
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False))
        task = task_for(tmp_path, tiny, CHATS, "causal_lm")
        task.prepare(model)
        samples = [
            {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * (n + 2)}]}
            for n in (1, 4, 7)
        ]
        items = task.encode_all(samples, silent())
        batch = task.collate(items)
        assert "attention_mask" in batch
        loss = task.loss(model, batch) / batch["units"]
        loss.backward()
        assert task.outputs.short
        ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        labels = task.pad([item.labels for item in items], -100)
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_model_that_caps_its_logits_takes_the_long_way(tmp_path, tiny):
    """Gemma2 squashes its logits after the output layer: hidden states times the head would be wrong."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = Gemma2Config(
        **sizes, num_key_value_heads=2, vocab_size=len(tokenizer), final_logit_softcapping=0.5, initializer_range=0.5
    )
    model = Gemma2ForCausalLM(config)
    task = task_for(tmp_path, tiny, CHATS, "causal_lm")
    task.prepare(model)
    samples = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]}]
    items = task.encode_all(samples, silent())
    batch = task.collate(items)
    loss = task.loss(model, batch).item() / batch["units"]
    assert task.outputs.short is False
    expected = model(input_ids=batch["input_ids"], labels=task.pad([item.labels for item in items], -100)).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_long_documents_are_split_and_nothing_is_lost(tmp_path, tiny):
    task = task_for(tmp_path, tiny, [{"text": "x"}], "causal_lm", data={"max_length": 16})
    items = task.encode_all([{"text": "abcdefghij" * 5}], silent())
    assert [item.length for item in items] == [16, 16, 16, 3]
    assert task.tokenizer.decode([token for item in items for token in item.ids]) == "abcdefghij" * 5 + "<end>"
