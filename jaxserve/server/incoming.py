"""The client's side of a request: what it sent, and whether it is still there."""

import asyncio
from collections.abc import Awaitable

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.errors import ApiError, ClientGone, validation_error


class BodyLimit:
    """Refuses a body of more than `max_bytes`, and one that has not come after `seconds`."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, self._limited(receive) if scope["type"] == "http" else receive, send)

    def _limited(self, receive: Receive) -> Receive:
        deadline = asyncio.get_running_loop().time() + self._seconds
        size, is_whole = 0, False

        async def limited() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()  # which tells of the client's leaving
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body has not come within {self._seconds:g} seconds; send it faster, or less",
                    headers={"Connection": "close"},
                ) from None
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self._max_bytes:  # what else comes is dropped by uvicorn: clients read answers only afterwards
                raise ApiError(
                    413, f"the body has more than {self._max_bytes} bytes, which is the most; send less at a time"
                )
            return message

        return limited


async def read_body[T: BaseModel](request: Request, request_type: type[T]) -> T:
    """The request's JSON as `request_type`."""
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    try:
        read = request_type.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error, request_type) from None
    request.state.body = read  # whose names errors go by from here on
    return read


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
