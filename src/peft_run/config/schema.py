"""The recipe: one file that says all about one run. What each field means stands in `config/help.py`.

Defaults are here and nowhere else. `None` means "decided later, from the model, the method or the data".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

Task = Literal["causal_lm", "seq_cls", "token_cls", "qa", "seq2seq", "dpo", "orpo", "kto"]
# Families of tasks.
HEADS = ("seq_cls", "token_cls", "qa")  # with an output layer that the base does not have
PREFERENCES = ("dpo", "orpo", "kto")  # whose tuned models answer chats
GENERATIVE = ("causal_lm", *PREFERENCES)  # decoders that write text

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def many(value: Any) -> Any:
    """One source may stand without its list, and a path without its section."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Quant(Section):
    bits: Literal[4, 8] = 4
    backend: Literal["bnb"] = "bnb"
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    loftq: bool = False


class Model(Section):
    path: str = ""
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    quant: Quant | None = None
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


class Source(Section):
    path: str
    format: str = "auto"
    map: dict[str, str] = {}
    encoding: str = "auto"
    sheet: str | None = None
    sample: Positive | None = None

    @field_validator("map", mode="before")
    @classmethod
    def columns_are_text(cls, value: Any) -> Any:
        return {key: str(column) for key, column in value.items()} if isinstance(value, dict) else value


class EvalData(Source):
    path: str | None = None
    split: Share = 0.1


class Data(Section):
    train: Annotated[list[Source], BeforeValidator(many)] = []
    eval: Annotated[EvalData, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)] = EvalData()
    test: Annotated[list[Source], BeforeValidator(lambda v: [] if v is None else many(v))] = []
    template: str = "auto"
    system: str | None = None
    prompt: str | None = None
    labels: list[str] | dict[str, str] | None = None
    max_length: Annotated[int, Field(ge=8)] = 512
    overlong: Literal["auto", "truncate", "drop", "error"] = "auto"
    train_on: Literal["completions", "last", "all"] = "completions"
    packing: bool = False
    invalid: Literal["error", "drop"] = "error"
    deduplicate: bool = False
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0

    @field_validator("labels", mode="before")
    @classmethod
    def labels_are_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(raw): str(name) for raw, name in value.items()}
        return [str(name) for name in value] if isinstance(value, list) else value


class Adapter(Section):
    method: str = "lora"
    r: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Share | None = None
    target: str | list[str] = "auto"
    modules_to_save: list[str] = []
    options: dict[str, Any] = {}


class EarlyStop(Section):
    patience: Positive = 3
    min_change: Annotated[float, Field(ge=0)] = 0.0


class Train(Section):
    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Positive | None = None
    lr: Annotated[float, Field(gt=0)] = 2e-4
    batch: Positive = 8
    accumulate: Positive = 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    grad_checkpoint: bool = False
    batching: Literal["grouped", "shuffled"] = "grouped"
    eval_every: Annotated[float, Field(gt=0)] = 0.2
    save_every: Annotated[float, Field(gt=0)] = 0.2
    save_total_limit: Positive = 2
    keep: Literal["best", "last"] = "best"
    early_stop: EarlyStop | None = None
    seed: int = 42
    threads: Positive | None = None
    shard: bool = False
    max_memory: str | None = None


class Preference(Section):
    beta: Annotated[float, Field(gt=0)] = 0.1
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0


class Generate(Section):
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0


class Eval(Section):
    metrics: list[str] | Literal["auto"] = "auto"
    generate: Generate = Generate()
    baseline: bool = True
    tokenizer: Literal["char", "word"] = "char"
    sample: Positive | None = None
    batch: Positive = 16
    forgetting: str = "auto"


class Track(Section):
    plots: bool = True
    log_every: Positive = 1


class Output(Section):
    dir: str = "runs"
    name: str | None = None


class Recipe(Section):
    version: Literal[1] = 1
    task: Task = "causal_lm"
    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = Adapter()
    train: Train = Train()
    preference: Preference = Preference()
    eval: Eval = Eval()
    track: Track = Track()
    output: Output = Output()

    _base: Path = PrivateAttr(default_factory=Path.cwd)  # the folder that relative paths start from

    @model_validator(mode="after")
    def name_is_one_folder(self) -> Recipe:
        name = self.output.name
        if name is not None and (name in (".", "..", "") or any(c in name for c in "/\\:\0")):
            raise ValueError(f"output.name must be the plain name of a folder, got {name!r}")
        return self

    @property
    def base(self) -> Path:
        return self._base

    def at(self, path: str) -> Path:
        """Where a path of the recipe is on this machine."""
        return Path(os.path.normpath(self._base / Path(path).expanduser()))
