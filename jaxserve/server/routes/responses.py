"""`/v1/responses`, and `/v1/responses/{response_id}` for those that are kept."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.chat.events import Answer, Event
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.incoming import read_body
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.base import ResponseType
from jaxserve.server.protocol.responses import (
    AllowedTools,
    DeletedResponse,
    IncompleteDetails,
    InputDetails,
    NamedFunction,
    OutputDetails,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    as_messages,
)
from jaxserve.server.response_store import ResponseStore, StoredResponse
from jaxserve.server.routes.reply import Counts, Reply, answer, json_response, new_id, server_sent_event
from jaxserve.server.routes.response_output import ResponseOutput
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.turn import Answers, Turn

logger = logging.getLogger(__name__)


class Responses:
    def __init__(self, served: Served):
        self._served = served
        self._store = ResponseStore()

    @describes(
        Operation(
            summary="The next answer of a conversation that may be kept here",
            takes=ResponsesRequest,
            answers=ResponseObject,
            streams=ResponseEvent,
            errors=GENERATES,
        )
    )
    async def create(self, request: Request) -> Response:
        body = await read_body(request, ResponsesRequest)
        model = self._served.asked(body.model)
        messages = self._before(body.previous_response_id) + as_messages(body.input)
        instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
        turn = Turn(
            messages=instructions + messages,
            sampling=body.sampling_settings(),
            tools=body.called(),
            template=body.template_arguments(),
            priority=body.priority,
            adapter=model.adapter,
            stream=bool(body.stream),
        )
        id = new_id("resp_")
        logger.debug("%s: user %r, %s", id, body.user, turn.sampling)
        params = SamplingParams(**(self._served.engine.sampling_defaults | turn.sampling))
        deltas, answers = await turn.begin(self._served.engine, id)
        store = None if body.store is False else self._store
        reply = _ResponseReply(id, model.name, body, params, answers, messages, store)
        return await answer(request, reply, deltas, stream=body.stream)

    @describes(Operation(summary="A response that was kept", answers=ResponseObject, errors=(404,)))
    async def retrieve(self, request: Request) -> Response:
        return json_response(self._find(request.path_params["response_id"]).response)

    @describes(Operation(summary="Keep a response no longer", answers=DeletedResponse, errors=(404,)))
    async def delete(self, request: Request) -> Response:
        id = request.path_params["response_id"]
        if not self._store.delete(id):
            raise _not_found(id)
        return json_response(DeletedResponse(id=id))

    def _find(self, id: str) -> StoredResponse:
        stored = self._store.get(id)
        if stored is None:
            raise _not_found(id)
        return stored

    def _before(self, id: str | None) -> list[dict[str, Any]]:
        """The conversation that a request goes on with."""
        if id is None:
            return []
        stored = self._store.get(id)
        if stored is None:
            raise ApiError(
                400,
                f"there is no response {id!r} any more, or it was not stored; send the conversation itself",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return stored.messages


def _format(body: ResponsesRequest) -> dict[str, Any]:
    given = body.text.format if body.text else None
    return given.model_dump(by_alias=True, exclude_unset=True) if given else {"type": "text"}


def _not_found(id: str) -> ApiError:
    return ApiError(404, f"there is no response {id!r}; it was not stored, or others have taken its place")


class _ResponseReply(Reply):
    last_event = None

    def __init__(
        self,
        id: str,
        model: str,
        body: ResponsesRequest,
        params: SamplingParams,
        answers: Answers,
        messages: list[dict[str, Any]],
        store: ResponseStore | None,
    ):
        super().__init__(id, model)
        self._body, self._params, self._answers = body, params, answers
        self._messages, self._store = messages, store
        self._output, self._answer = ResponseOutput(self._event), Answer()
        self._sequence_number = -1
        self._finish_reason: str | None = None

    def chunks(self, delta: RequestOutput) -> Iterator[ResponseEvent]:
        if self._sequence_number < 0:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
        for completion in delta.outputs:
            yield from self._read(completion)

    def last_chunks(self, counts: Counts) -> Iterable[ResponseEvent]:
        yield from self._output.close(self._status)
        response = self._finished(counts)
        yield self._event(f"response.{response.status}", response=response)

    def whole(self, outputs: list[RequestOutput], counts: Counts) -> ResponseObject:
        for output in outputs:
            for completion in output.outputs:
                [*self._read(completion)]
        [*self._output.close(self._status)]
        return self._finished(counts)

    def failure(self, error: Exception) -> ResponseEvent:
        response = self._response("failed")
        response.error = ResponseError(code="server_error", message=str(as_api_error(error)))
        return self._event("response.failed", response=response)

    def event(self, chunk: ResponseType) -> str:
        return server_sent_event(chunk.to_json(), getattr(chunk, "type", None))

    def _read(self, completion: CompletionOutput) -> Iterator[ResponseEvent]:
        self._finish_reason = completion.finish_reason
        event: Event
        for event in self._answers.read(completion):
            self._answer.add(event)
            yield from self._output.add(event)

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _finished(self, counts: Counts) -> ResponseObject:
        response = self._response(self._status)
        response.completed_at = int(time.time())
        if response.status == "incomplete":
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        response.usage = ResponseUsage(
            input_tokens=counts.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=counts.cached_tokens),
            output_tokens=counts.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=self._answers.num_reasoning_tokens),
            total_tokens=counts.prompt_tokens + counts.completion_tokens,
        )
        if self._store is not None:
            self._store.put(StoredResponse(response, [*self._messages, self._answer.as_message()]))
        return response

    def _response(self, status: Any) -> ResponseObject:
        body = self._body
        return ResponseObject(
            id=self.id,
            created_at=self.created,
            status=status,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=self.model,
            output=[item.model_copy(deep=True) for item in self._output.items],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            store=self._store is not None,
            temperature=self._params.temperature,
            text={"format": _format(body)},
            tool_choice=body.tool_choice.model_dump()
            if isinstance(body.tool_choice, NamedFunction | AllowedTools)
            else body.tool_choice or "auto",
            tools=[tool.model_dump() | {"strict": bool(tool.strict)} for tool in body.tools or []],
            top_p=self._params.top_p,
            user=body.user,
        )

    def _event(self, type: str, **fields: Any) -> ResponseEvent:
        self._sequence_number += 1
        return ResponseEvent(type=type, sequence_number=self._sequence_number, **fields)
