"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: requests, in vLLM's shapes."""

from typing import Literal

from pydantic import Field

from jaxserve.server.protocol.base import RequestType, ResponseType


class LoadAdapterRequest(RequestType):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)  # a directory, where the server runs, or an id of HuggingFace's hub


class UnloadAdapterRequest(RequestType):
    lora_name: str


class UnloadedAdapter(ResponseType):
    id: str
    object: Literal["model"]
    deleted: Literal[True]
