"""How every endpoint that generates answers: whole, or as server-sent events."""

import abc
import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxserve.outputs import RequestOutput, add_delta
from jaxserve.server import logs
from jaxserve.server.errors import as_api_error
from jaxserve.server.failures import Unserved
from jaxserve.server.incoming import while_connected
from jaxserve.server.protocol.base import ResponseType, Usage

Deltas = AsyncGenerator[RequestOutput]

_PING_SECONDS = 15.0  # after which a stream shows that it is still there, so that no proxy gives it up


class Counts:
    """Counts a prompt once, whatever number of completions it has."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[int, int]] = {}  # tokens, and those that the prefix cache spared
        self.completion_tokens = 0

    def count(self, delta: RequestOutput) -> None:
        self._prompts[delta.request_id] = len(delta.prompt_token_ids), delta.metrics.num_cached_tokens
        self.completion_tokens += sum(len(output.token_ids) for output in delta.outputs)

    def note(self) -> None:
        logs.note(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for tokens, _ in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        return sum(cached for _, cached in self._prompts.values())

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )


def new_id(prefix: str, given: str | None = None) -> str:
    """The client's own id, if it has given one, or one that nobody else has."""
    return prefix + (given or uuid.uuid4().hex)


class Reply(abc.ABC):
    """What an endpoint makes of the deltas of one request."""

    last_event: ClassVar[str | None] = "[DONE]"  # of a stream that came to its end
    usage_in_chunks = False  # whether each chunk tells how much it is so far

    def __init__(self, id: str, model: str):
        self.id, self.model = id, model
        self.created = int(time.time())

    @abc.abstractmethod
    def chunks(self, delta: RequestOutput) -> Iterable[ResponseType]:
        """What a streaming client gets of a delta."""

    @abc.abstractmethod
    def last_chunks(self, counts: Counts) -> Iterable[ResponseType]:
        """What it gets after the last one."""

    @abc.abstractmethod
    def whole(self, outputs: list[RequestOutput], counts: Counts) -> ResponseType:
        """What a client that does not stream gets."""

    def failure(self, error: Exception) -> ResponseType:
        """What a streaming client gets if the engine fails."""
        return as_api_error(error).body()

    def event(self, chunk: ResponseType) -> str:
        return server_sent_event(chunk.to_json())


def server_sent_event(data: str, name: str | None = None) -> str:
    """As it goes over the wire; `data` is one line."""
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


def json_response(answer: ResponseType) -> Response:
    return Response(answer.to_json(), media_type="application/json")


async def answer(request: Request, reply: Reply, deltas: Deltas, *, stream: bool | None) -> Response:
    """The response. A stream begins with the first delta, so that whatever fails before has a status of its own."""
    logs.note(id=reply.id)
    try:
        if stream:
            first = await while_connected(request, anext(deltas))
            return _EventStream(_events(reply, first, deltas), deltas)
    except BaseException:
        await deltas.aclose()
        raise
    outputs = list((await collected(request, deltas)).values())
    counts = Counts()
    for output in outputs:
        counts.count(output)
    counts.note()
    return json_response(reply.whole(outputs, counts))


async def collected(request: Request, deltas: Deltas) -> dict[str, RequestOutput]:
    """All that comes, by request id; it ends when the client leaves."""
    try:
        return await while_connected(request, _collect(deltas))
    finally:
        await deltas.aclose()


async def _collect(deltas: Deltas) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    async for delta in deltas:
        add_delta(outputs, delta)
    return outputs


async def _events(reply: Reply, first: RequestOutput, deltas: Deltas) -> AsyncGenerator[str]:
    """What goes to the client at a time: the events of a delta, which a step has added."""
    counts = Counts()
    delta: RequestOutput | None = first
    try:
        while delta:
            counts.count(delta)
            chunks = list(reply.chunks(delta))
            if reply.usage_in_chunks:
                for chunk in chunks:
                    chunk.usage = counts.usage  # type: ignore[attr-defined]
            if chunks:
                yield "".join(map(reply.event, chunks))
            delta = await anext(deltas, None)
        last = "".join(map(reply.event, reply.last_chunks(counts)))
        if reply.last_event is not None:
            last += server_sent_event(reply.last_event)
        if last:
            yield last
    except Unserved as error:  # the status is sent; without its last event, nobody can take what came for all
        logs.note(error=str(error))
        yield reply.event(reply.failure(error))
    finally:
        counts.note()


class _EventStream(StreamingResponse):
    """The events of a request, which ends with the response however that ends: also if it never came to stream."""

    def __init__(self, events: AsyncGenerator[str], deltas: Deltas):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._deltas = events, deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # which cancels `stream_response` if the client leaves
        finally:
            await self._events.aclose()
            await self._deltas.aclose()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.create_task(self._ping(send))
        try:
            async for text in self._events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS)
            await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
