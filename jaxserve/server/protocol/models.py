"""`/v1/models`: response."""

from typing import Literal

from jaxserve.server.protocol.base import ResponseType


class ModelCard(ResponseType):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(ResponseType):
    object: Literal["list"]
    data: list[ModelCard]
