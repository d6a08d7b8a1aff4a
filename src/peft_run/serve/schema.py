"""What clients may send. Every number has bounds on both sides; an unknown field is an error that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SEED = 2**63
MOST_TOKENS = 1 << 20  # the model's own limit is checked later
MOST_ROWS = 256  # of one request

Text = Annotated[str, Field(max_length=4 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


def no(value: bool) -> bool:
    if value:
        raise ValueError("true is not served")
    return value


# Not Literal, which takes False for 0 and True for 1.
Zero = Annotated[float, Field(ge=0, le=0)]
No = Annotated[bool, AfterValidator(no), Field(json_schema_extra={"const": False})]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]
    name: Name | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool = False


class Asked(Strict):
    """What the two ways of generating have in common."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=-SEED, lt=SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    ignore_eos: bool = False  # go on behind the tokens that end an answer: vLLM's field, for measurements
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: Name | None = None
    # Clients send these by default; they change nothing here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(Asked):
    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=16)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=16)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: No = False
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


class EmbeddingRequest(Strict):
    model: Name
    input: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    user: Name | None = None


class LoadRequest(Strict):
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(Strict):
    lora_name: Name


class ClassifyRequest(Strict):
    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_ROWS)]
    pair: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_ROWS)] | None = None  # second texts

    def rows(self) -> list[dict[str, Any]]:
        texts, pairs = ([x] if isinstance(x, str) else x for x in (self.input, self.pair))
        if pairs is None:
            return [{"text": text} for text in texts]
        return [{"text": text, "pair": pair} for text, pair in zip(texts, pairs, strict=True)]

    @model_validator(mode="after")
    def check_pairs(self) -> ClassifyRequest:
        try:
            self.rows()
        except ValueError as error:
            raise ValueError("pair must have as many texts as input") from error
        return self


Words = Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=1 << 16)]


class TokenClassifyRequest(Strict):
    model: Name
    input: Words | Annotated[list[Words], Field(min_length=1, max_length=MOST_ROWS)]  # texts that are split already

    def rows(self) -> list[dict[str, Any]]:
        texts = [self.input] if isinstance(self.input[0], str) else self.input
        return [{"tokens": words} for words in texts]


class QaRequest(Strict):
    model: Name
    question: Text
    context: Text

    def rows(self) -> list[dict[str, Any]]:
        return [{"question": self.question, "context": self.context}]
