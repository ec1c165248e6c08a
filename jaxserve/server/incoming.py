"""The client's side of a request: what it sent, and whether it is still there."""

import asyncio
from collections.abc import Awaitable

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from jaxserve.server.errors import ApiError, ClientGone, validation_error

MAX_BODY_BYTES = 64 * 2**20  # a prompt of millions of token ids


async def read_body[T: BaseModel](request: Request, request_type: type[T]) -> T:
    """The request's JSON as `request_type`."""
    body, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= MAX_BODY_BYTES:  # the rest is read and dropped: a client reads no answer before it has sent all
                body += chunk
    except ClientDisconnect:
        raise ClientGone from None
    if size > MAX_BODY_BYTES:
        raise ApiError(400, f"the body has {size} bytes and at most {MAX_BODY_BYTES} are possible; send less at a time")
    try:
        return request_type.model_validate_json(bytes(body))
    except ValidationError as error:
        raise validation_error(error, request_type) from None


async def while_connected[T](request: Request, work: Awaitable[T]) -> T:
    """What `work` comes to. If the client leaves first, `work` is cancelled and `ClientGone` raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
