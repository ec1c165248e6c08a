"""A file of requests in OpenAI's batch format, answered by the application itself, in this process."""

import asyncio
import json
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
from pydantic import ValidationError, model_validator
from starlette.applications import Starlette

from jaxserve.server.errors import validation_error
from jaxserve.server.protocol.base import RequestType, ResponseType, refusal

MAX_AT_ONCE = 1024  # requests that the engine has at the same time: more than run, so that it can choose


class BatchRequest(RequestType):
    """One line of the input."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]

    @model_validator(mode="after")
    def _check_url(self) -> "BatchRequest":
        if not re.fullmatch(r"/[\w/.-]*", self.url):
            raise refusal("url", f"url is {self.url!r}; give a path, such as /v1/chat/completions")
        if self.body.get("stream"):
            raise refusal("body", "body has stream=true, and a batch has whole answers; leave it out")
        return self


class BatchAnswer(ResponseType):
    """What the server answered, whatever its status."""

    status_code: int
    request_id: str
    body: Any


class BatchError(ResponseType):
    """Why a line is no request."""

    code: str
    message: str


class BatchResult(ResponseType):
    """One line of the output."""

    id: str
    custom_id: str | None
    response: BatchAnswer | None
    error: BatchError | None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200

    @property
    def completion_tokens(self) -> int:
        body = self.response.body if self.response else {}
        return (body.get("usage") or {}).get("completion_tokens", 0)


async def run_batch(app: Starlette, lines: Sequence[str], on_result: Callable[[BatchResult], None]) -> None:
    """Answer all lines in one batch. Results come in the lines' order, each once it and those before it are there."""
    room = asyncio.Semaphore(MAX_AT_ONCE)
    ids: set[str] = set()
    requests = [_parse(line, ids) for line in lines]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def answer(request: BatchRequest) -> BatchResult:
        async with room:
            response = await client.post(request.url, json=request.body, timeout=None)
        return _result(request.custom_id, response=response)

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://in-process") as client,
        asyncio.TaskGroup() as group,
    ):
        results = [
            group.create_task(answer(request)) if isinstance(request, BatchRequest) else request for request in requests
        ]
        for result in results:
            on_result(await result if isinstance(result, asyncio.Task) else result)


def _parse(line: str, ids: set[str]) -> BatchRequest | BatchResult:
    """The request of a line, whose id joins `ids`; or what is wrong with it."""
    try:
        request = BatchRequest.model_validate_json(line)
    except ValidationError as error:
        message = str(validation_error(error, BatchRequest))
        return _result(_custom_id(line), error=BatchError(code="invalid_line", message=message))
    if request.custom_id in ids:
        message = f"custom_id is {request.custom_id!r} on a line before too; give each line one of its own"
        return _result(request.custom_id, error=BatchError(code="invalid_line", message=message))
    ids.add(request.custom_id)
    return request


def _custom_id(line: str) -> str | None:
    """A line's id, if there is one in it."""
    try:
        found = json.loads(line)["custom_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _result(
    custom_id: str | None, *, response: httpx.Response | None = None, error: BatchError | None = None
) -> BatchResult:
    number = uuid.uuid4().hex
    answer = None
    if response is not None:
        answer = BatchAnswer(status_code=response.status_code, request_id=f"req_{number}", body=response.json())
    return BatchResult(id=f"batch_req_{number}", custom_id=custom_id, response=answer, error=error)
