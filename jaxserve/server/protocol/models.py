"""`/v1/models`: responses."""

from typing import Literal

from jaxserve.server.protocol.base import ResponseType


class ModelCard(ResponseType):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str  # what it was loaded from, by which vLLM's clients find its tokenizer
    parent: str | None  # the model that an adapter is of
    max_model_len: int


class ModelList(ResponseType):
    object: Literal["list"]
    data: list[ModelCard]
