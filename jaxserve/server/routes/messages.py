"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.chat.events import CallArguments, CallBegin, Content, Event, Reasoning
from jaxserve.errors import InputError
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.failures import Unserved
from jaxserve.server.incoming import read_body
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.base import ErrorResponse, ResponseType
from jaxserve.server.protocol.messages import (
    AnswerBlock,
    AnswerMessage,
    BlockDelta,
    CountTokensRequest,
    MessageDelta,
    MessageError,
    MessageErrorDetail,
    MessageEvent,
    MessagesRequest,
    MessageUsage,
    TextAnswer,
    ThinkingAnswer,
    TokenCount,
    ToolUse,
    parsed_input,
)
from jaxserve.server.routes.reply import Counts, Reply, answer, json_response, new_id, server_sent_event
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.turn import Answers, Turn

logger = logging.getLogger(__name__)

_ERROR_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_ERRORS_ARE = MessageError | ErrorResponse  # the latter where no route has been reached, as for a wrong key

Handler = Callable[["Messages", Request], Awaitable[Response]]


def _errors_as_anthropic_has_them(handler: Handler) -> Handler:
    @functools.wraps(handler)
    async def handle(self: "Messages", request: Request) -> Response:
        try:
            return await handler(self, request)
        except (ApiError, Unserved, HTTPException, InputError) as error:
            told = as_api_error(error, request)
            return Response(_error(told).to_json(), told.status, told.headers, media_type="application/json")

    return handle


def _error(error: Exception) -> MessageError:
    told = as_api_error(error)
    return MessageError(error=MessageErrorDetail(type=_ERROR_TYPES.get(told.status, "api_error"), message=str(told)))


class Messages:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(
            summary="The next message of a conversation, as Anthropic has it",
            takes=MessagesRequest,
            answers=AnswerMessage,
            streams=MessageEvent,
            errors=GENERATES,
            errors_are=_ERRORS_ARE,
        )
    )
    @_errors_as_anthropic_has_them
    async def create(self, request: Request) -> Response:
        body = await read_body(request, MessagesRequest)
        model = self._served.asked(body.model)
        id = new_id("msg_")
        turn = dataclasses.replace(
            _turn(body), sampling=body.sampling_settings(), adapter=model.adapter, stream=bool(body.stream)
        )
        logger.debug("%s: user %r, %s", id, body.metadata and body.metadata.user_id, turn.sampling)
        deltas, answers = await turn.begin(self._served.engine, id)
        return await answer(request, _MessageReply(id, model.name, answers), deltas, stream=body.stream)

    @describes(
        Operation(
            summary="How many tokens a conversation has",
            takes=CountTokensRequest,
            answers=TokenCount,
            errors=(404,),
            errors_are=_ERRORS_ARE,
        )
    )
    @_errors_as_anthropic_has_them
    async def count_tokens(self, request: Request) -> Response:
        body = await read_body(request, CountTokensRequest)
        self._served.asked(body.model)
        token_ids = await _turn(body).render(self._served.engine)
        return json_response(TokenCount(input_tokens=len(token_ids)))


def _turn(body: CountTokensRequest) -> Turn:
    return Turn(
        messages=body.conversation,
        sampling={},
        tools=body.called(),
        template=body.template_arguments(),
    )


class _Blocks:
    """The blocks of an answer, and the events that tell a client how they grow. The last one is open."""

    def __init__(self) -> None:
        self.done: list[AnswerBlock] = []
        self._kind: type[AnswerBlock] | None = None  # of the open one
        self._call: CallBegin | None = None
        self._text = ""
        self.calls = False

    def add(self, event: Event) -> Iterator[MessageEvent]:
        match event:
            case Reasoning(text):
                yield from self._grow(ThinkingAnswer, BlockDelta(type="thinking_delta", thinking=text), text)
            case Content(text):
                yield from self._grow(TextAnswer, BlockDelta(type="text_delta", text=text), text)
            case CallBegin():
                yield from self.close()
                self._call, self.calls = event, True
                yield self._begin(ToolUse)
            case CallArguments(_, text):
                yield from self._grow(ToolUse, BlockDelta(type="input_json_delta", partial_json=text), text)

    def close(self) -> Iterator[MessageEvent]:
        """The open block has come to its end."""
        if self._kind is not None:
            yield MessageEvent(type="content_block_stop", index=len(self.done))
            self.done.append(self._block(self._text))
            self._kind, self._text = None, ""

    def _begin(self, kind: type[AnswerBlock]) -> MessageEvent:
        self._kind = kind
        return MessageEvent(
            type="content_block_start", index=len(self.done), content_block=self._block("{}", empty=True)
        )

    def _grow(self, kind: type[AnswerBlock], delta: BlockDelta, text: str) -> Iterator[MessageEvent]:
        if self._kind is not kind:
            yield from self.close()
            yield self._begin(kind)
        self._text += text
        yield MessageEvent(type="content_block_delta", index=len(self.done), delta=delta)

    def _block(self, text: str, *, empty: bool = False) -> AnswerBlock:
        if self._kind is ThinkingAnswer:
            return ThinkingAnswer(thinking="" if empty else text)
        if self._kind is TextAnswer or self._call is None:
            return TextAnswer(text="" if empty else text)
        return ToolUse(id=self._call.id, name=self._call.name, input=parsed_input(text))


class _MessageReply(Reply):
    last_event = None

    def __init__(self, id: str, model: str, answers: Answers):
        super().__init__(id, model)
        self._answers, self._blocks = answers, _Blocks()
        self._begun = False
        self._end = CompletionOutput(0)

    def chunks(self, delta: RequestOutput) -> Iterator[MessageEvent]:
        if not self._begun:
            self._begun = True
            usage = MessageUsage(input_tokens=len(delta.prompt_token_ids), output_tokens=0)
            message = AnswerMessage(id=self.id, model=self.model, content=[], usage=usage)
            yield MessageEvent(type="message_start", message=message)
        for completion in delta.outputs:
            yield from self._read(completion)

    def last_chunks(self, counts: Counts) -> Iterable[MessageEvent]:
        yield from self._blocks.close()
        delta = MessageDelta(stop_reason=self._stop_reason, stop_sequence=self._stop_sequence)
        yield MessageEvent(type="message_delta", delta=delta, usage=_usage(counts))
        yield MessageEvent(type="message_stop")

    def whole(self, outputs: list[RequestOutput], counts: Counts) -> AnswerMessage:
        for output in outputs:
            for completion in output.outputs:
                [*self._read(completion)]
        [*self._blocks.close()]
        return AnswerMessage(
            id=self.id,
            model=self.model,
            content=self._blocks.done,
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=_usage(counts),
        )

    def failure(self, error: Exception) -> MessageEvent:
        return MessageEvent(type="error", error=_error(error).error)

    def event(self, chunk: ResponseType) -> str:
        return server_sent_event(chunk.to_json(), getattr(chunk, "type", None))

    def _read(self, completion: CompletionOutput) -> Iterator[MessageEvent]:
        self._end = completion
        for event in self._answers.read(completion):
            yield from self._blocks.add(event)

    @property
    def _stop_sequence(self) -> str | None:
        return self._end.stop_reason if isinstance(self._end.stop_reason, str) else None

    @property
    def _stop_reason(self) -> str:
        if self._end.finish_reason == "length":
            return "max_tokens"
        if self._stop_sequence is not None:
            return "stop_sequence"
        return "tool_use" if self._blocks.calls else "end_turn"


def _usage(counts: Counts) -> MessageUsage:
    return MessageUsage(
        input_tokens=counts.prompt_tokens - counts.cached_tokens,
        cache_read_input_tokens=counts.cached_tokens,
        output_tokens=counts.completion_tokens,
    )
