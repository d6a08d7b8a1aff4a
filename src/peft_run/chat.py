"""A conversation with a tuned model on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_run.artefact import Tuned
    from peft_run.console import Console


class Chat:
    """What was said so far, and the model that goes on with it."""

    def __init__(self, tuned: Tuned, system: str | None, max_new_tokens: int, temperature: float) -> None:
        self.tuned, self.max_new_tokens, self.temperature = tuned, max_new_tokens, temperature
        self.system = tuned.recipe.data.system if system is None else system
        self.with_adapter = True
        self.new()

    def new(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def undo(self) -> bool:
        """Forget the last question and its answer; whether there was one."""
        if not any(m["role"] == "user" for m in self.messages):
            return False
        while self.messages.pop()["role"] != "user":
            pass
        return True

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, *, base: bool = False) -> Iterator[str]:
        """The answer to the last question, piece by piece. That of the base model is not kept."""
        from threading import Thread

        import torch
        from transformers import TextIteratorStreamer

        from peft_run.config.schema import Generate
        from peft_run.generation import generation_config

        ids = torch.tensor([self.tuned.renderer.prompt(self.messages)], device=self.tuned.device)
        pieces = TextIteratorStreamer(self.tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = Generate(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        config = generation_config(self.tuned.stop_ids, self.tuned.tokenizer.pad_token_id, settings)
        off = (base or not self.with_adapter) and hasattr(self.tuned.model, "disable_adapter")

        def generate() -> None:
            try:
                with self.tuned.model.disable_adapter() if off else contextlib.nullcontext():
                    mask = torch.ones_like(ids)
                    self.tuned.model.generate(
                        input_ids=ids, attention_mask=mask, generation_config=config, streamer=pieces
                    )
            finally:
                pieces.end()  # also after an error, or the reader would wait for ever

        thread = Thread(target=generate, daemon=True)
        thread.start()
        said = ""
        for piece in pieces:
            said += piece
            yield piece
        thread.join()
        if not base:
            self.messages.append({"role": "assistant", "content": said.strip()})

    def save(self, path: Path) -> None:
        save_sample(path, self.messages)


def save_sample(path: Path, messages: Sequence[dict[str, str]]) -> None:
    """Append a conversation to a file of training samples."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n")


def talk(chat: Chat, console: Console, *, compare: bool) -> None:
    """Questions from stdin, answers to stdout, until the end of the input."""
    console("deploy.chat_hello", run=chat.tuned.run.path)
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.startswith("/"):
            command(chat, line.strip(), console)
        elif line.strip():
            chat.ask(line.strip())
            if compare:
                show(console.text("deploy.chat_base"), chat.answer(base=True))
            show(console.text("deploy.chat_tuned") if compare else None, chat.answer())


def show(name: str | None, pieces: Iterator[str]) -> None:
    print(f"[{name}] " if name else "", end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def command(chat: Chat, line: str, console: Console) -> None:
    word, _, rest = line.partition(" ")
    if word == "/help":
        console("deploy.chat_help")
    elif word == "/new":
        chat.new()
    elif word == "/undo":
        if not chat.undo():
            console("deploy.chat_nothing")
    elif word == "/base" and rest in ("on", "off"):
        chat.with_adapter = rest == "off"
    elif word == "/save" and rest:
        if len(chat.messages) < 2:
            console("deploy.chat_nothing")
            return
        chat.save(Path(rest))
        console("deploy.chat_saved", path=rest)
    else:
        console("deploy.chat_unknown", word=line)
