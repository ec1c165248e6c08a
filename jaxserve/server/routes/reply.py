"""How every endpoint that generates answers: whole, or as server-sent events."""

import abc
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.outputs import RequestOutput, add_delta
from jaxserve.server import logs
from jaxserve.server.errors import as_api_error
from jaxserve.server.failures import Unserved
from jaxserve.server.incoming import while_connected
from jaxserve.server.protocol.base import ResponseType, Usage, UsageWanted

Deltas = AsyncGenerator[RequestOutput]


class Reply(abc.ABC):
    """What an endpoint makes of the deltas of one request."""

    def __init__(self, id_prefix: str, model: str, request_id: str | None = None):
        self.id = f"{id_prefix}-{request_id or uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())

    @abc.abstractmethod
    def chunks(self, delta: RequestOutput) -> Iterable[ResponseType]:
        """What a streaming client gets of a delta."""

    @abc.abstractmethod
    def usage_chunk(self, usage: Usage) -> ResponseType:
        """What it gets last, if it asked for that."""

    @abc.abstractmethod
    def whole(self, outputs: list[RequestOutput], usage: Usage) -> ResponseType:
        """What a client that does not stream gets."""


def json_response(answer: ResponseType) -> Response:
    return Response(answer.to_json(), media_type="application/json")


async def answer(
    request: Request,
    reply: Reply,
    deltas: Deltas,
    *,
    stream: bool | None,
    include_usage: UsageWanted = UsageWanted.NOWHERE,
) -> Response:
    """The response. A stream begins with the first delta, so that whatever fails before has a status of its own."""
    logs.note(id=reply.id)
    try:
        if stream:
            first = await while_connected(request, anext(deltas))
            return _EventStream(_events(reply, first, deltas, include_usage), deltas)
        outputs = await while_connected(request, _collect(deltas))
    except BaseException:
        await deltas.aclose()
        raise
    counter = _Counter()
    for output in outputs:
        counter.count(output)
    counter.note()
    return json_response(reply.whole(outputs, counter.usage))


async def _collect(deltas: Deltas) -> list[RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    async for delta in deltas:
        add_delta(outputs, delta)
    return list(outputs.values())


async def _events(reply: Reply, first: RequestOutput, deltas: Deltas, include_usage: UsageWanted) -> AsyncIterator[str]:
    counter = _Counter()
    delta: RequestOutput | None = first
    try:
        while delta:
            counter.count(delta)
            for chunk in reply.chunks(delta):
                if include_usage is UsageWanted.EVERYWHERE:
                    chunk.usage = counter.usage  # type: ignore[attr-defined]  # whoever takes the option has it
                yield chunk.to_json()
            delta = await anext(deltas, None)
        if include_usage:
            yield reply.usage_chunk(counter.usage).to_json()
        yield "[DONE]"
    except Unserved as error:  # the status is sent; without [DONE], nobody can take what came for all
        logs.note(error=str(error))
        yield as_api_error(error).body().to_json()
    finally:
        counter.note()


class _EventStream(EventSourceResponse):
    """The events of a request, which ends with the response however that ends: also if it never came to stream."""

    def __init__(self, events: AsyncIterator[str], deltas: Deltas):
        super().__init__(events, sep="\n")
        self._deltas = deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._deltas.aclose()


class _Counter:
    """Counts a prompt once, whatever number of completions it has."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._completions = 0

    def count(self, delta: RequestOutput) -> None:
        self._prompts[delta.request_id] = len(delta.prompt_token_ids)
        self._completions += sum(len(output.token_ids) for output in delta.outputs)

    def note(self) -> None:
        logs.note(prompt_tokens=sum(self._prompts.values()), completion_tokens=self._completions)

    @property
    def usage(self) -> Usage:
        prompts = sum(self._prompts.values())
        return Usage(
            prompt_tokens=prompts, completion_tokens=self._completions, total_tokens=prompts + self._completions
        )
