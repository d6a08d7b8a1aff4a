"""Helpers shared by the tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent

if str(FIXTURES) not in sys.path:
    sys.path.insert(0, str(FIXTURES))


def needs(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [name for name in modules if not _is_here(name)]


def _is_here(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def upstream_python() -> str | None:
    """The interpreter of an environment with upstream peft, if there is one."""
    named = os.environ.get("PEFT_UPSTREAM_PYTHON")
    local = ROOT / "benchmarks" / ".venv-upstream" / "bin" / "python"
    return named or (str(local) if local.exists() else None)


def offline(**changes: str) -> dict[str, str]:
    """An environment for subprocesses: no hub, two threads, no progress bars."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**os.environ, **quiet, **changes}


def python(
    *args: str, env: dict[str, str] | None = None, interpreter: str = sys.executable, timeout: float = 300, **more
) -> str:
    """Run a script in a subprocess; a failure shows what it printed."""
    done = subprocess.run(
        [interpreter, *args],
        env=offline() if env is None else env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **more,
    )
    assert done.returncode == 0, f"{args}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer():
    """A byte-level tokenizer of about 260 entries, with padding and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=special[3:],
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_llama():
    """A tiny Llama with room for the tiny tokenizer."""
    import models

    return models.llama(vocab_size=264, max_position_embeddings=128)


def snapshot(model, trainable: bool) -> dict:
    """Copies of the parameters that are trainable, or of those that are not."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad is trainable}


def changed(before: dict, model) -> list[str]:
    """Names of the snapshot's parameters that have another value now."""
    now = dict(model.named_parameters())
    return [name for name, value in before.items() if not value.equal(now[name].detach())]
