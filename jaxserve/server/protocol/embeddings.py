"""`/v1/embeddings` and `/score`: requests and responses."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from jaxserve.server.protocol.base import Priority, RequestType, ResponseType
from jaxserve.server.protocol.prompts import Prompts


class EmbeddingRequest(RequestType):
    """The input has the four forms of a completion's prompt. `pooling` and `normalize` are our own."""

    unsupported = {"dimensions": ()}

    model: str | None = None
    user: str | None = None  # goes to the debug log
    priority: Priority = 0
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None

    def other_names(self) -> dict[str, str]:
        return {"prompt": "input", "prompt_token_ids": "input"}


class EmbeddingUsage(ResponseType):
    prompt_tokens: int
    total_tokens: int


class Embedding(ResponseType):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # of base64: float32, little-endian


class EmbeddingList(ResponseType):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


def _listed(texts: object) -> object:
    return [texts] if isinstance(texts, str) else texts


Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]


class ScoreRequest(RequestType):
    """How likely each of `text_2` is after its `text_1`; one `text_1` may have several."""

    model: str | None = None
    user: str | None = None
    priority: Priority = 0
    text_1: Texts
    text_2: Texts

    def other_names(self) -> dict[str, str]:
        both = "text_1 with its text_2"  # which are one prompt
        return {"prompts": "text_1", "continuations": "text_2", "prompt": "text_1", "the prompt": both}


class ScoreEntry(ResponseType):
    object: Literal["score"]
    index: int
    score: float  # the sum of the log-probabilities of its tokens
    is_greedy: bool  # whether each of them is the likeliest in its place
    token_logprobs: list[float]


class ScoreList(ResponseType):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreEntry]
    usage: EmbeddingUsage
