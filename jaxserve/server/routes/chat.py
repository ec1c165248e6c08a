"""`/v1/chat/completions`"""

import logging
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.chat.events import Answer, as_delta
from jaxserve.chat.tools import Tools
from jaxserve.engine.detokenizer import TokenBytes
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.incoming import read_body
from jaxserve.server.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.base import UsageWanted
from jaxserve.server.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
)
from jaxserve.server.routes.reply import Counts, Reply, answer, new_id
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.turn import Answers, Turn

logger = logging.getLogger(__name__)


class Chat:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(
            summary="The answer to a conversation",
            takes=ChatCompletionRequest,
            answers=ChatCompletion,
            streams=ChatChunk,
            last_event=Reply.last_event,
            errors=GENERATES,
        )
    )
    async def create(self, request: Request) -> Response:
        body = await read_body(request, ChatCompletionRequest)
        model = self._served.asked(body.model)
        engine = self._served.engine
        turn = Turn(
            messages=[message.model_dump(exclude_none=True) for message in body.messages],
            sampling=body.sampling_settings(),
            tools=body.called(),
            template=body.template_arguments(),
            echoed=body.echoed,
            include_reasoning=body.include_reasoning is not False,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            adapter=model.adapter,
            stream=bool(body.stream),
        )
        id = new_id("chatcmpl-", body.request_id)
        logger.debug("%s: user %r, %s", id, body.user, turn.sampling)
        deltas, answers = await turn.begin(engine, id)
        reply = _ChatReply(id, model.name, body, answers, turn.tools, engine.tokens)
        return await answer(request, reply, deltas, stream=body.stream)


class _ChatReply(Reply):
    """Choice i is completion i of the conversation."""

    def __init__(
        self,
        id: str,
        model: str,
        body: ChatCompletionRequest,
        answers: Answers,
        tools: Tools,
        tokens: TokenBytes | None,
    ):
        super().__init__(id, model)
        self.usage_in_chunks = body.include_usage is UsageWanted.EVERYWHERE
        self._body, self._answers, self._tools, self._tokens = body, answers, tools, tokens
        self._begun: set[int] = set()  # choices whose role has been told
        self._calls: set[int] = set()  # choices that call tools

    def chunks(self, delta: RequestOutput) -> Iterable[ChatChunk]:
        for output in delta.outputs:
            if output.index not in self._begun:
                yield self._first_chunk(delta, output.index)
                self._begun.add(output.index)
            added = as_delta(self._answers.read(output))
            if "tool_calls" in added:
                self._calls.add(output.index)
            choice = ChatChunkChoice(
                index=output.index,
                delta=Delta(**added),
                logprobs=self._logprobs(output),
                finish_reason=self._finish_reason(output),
                stop_reason=output.stop_reason,
            )
            if self._body.return_token_ids:
                choice.token_ids = output.token_ids
            if added or choice.logprobs or choice.token_ids or output.finish_reason:
                yield self._chunk([choice])

    def last_chunks(self, counts: Counts) -> Iterable[ChatChunk]:
        if self._body.include_usage:
            chunk = self._chunk([])
            chunk.usage = counts.usage
            yield chunk

    def whole(self, outputs: list[RequestOutput], counts: Counts) -> ChatCompletion:
        (output,) = outputs
        completion = ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(completion) for completion in output.outputs],
            usage=counts.usage,
        )
        if self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            completion.prompt_logprobs = prompt_logprobs(
                output.prompt_token_ids, output.prompt_logprobs, self._body.prompt_logprobs
            )
        if self._body.return_token_ids:
            completion.prompt_token_ids = output.prompt_token_ids
        return completion

    def _first_chunk(self, delta: RequestOutput, index: int) -> ChatChunk:
        role = Delta(role="assistant", content="")
        choice = ChatChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None, stop_reason=None)
        chunk = self._chunk([choice])
        if self._body.return_token_ids and not self._begun:
            chunk.prompt_token_ids = delta.prompt_token_ids
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices
        )
        if self._body.include_usage:
            chunk.usage = None  # as OpenAI has it: in every chunk, and told in the last
        return chunk

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        found = Answer()
        for event in self._answers.read(completion):
            found.add(event)
        if found.tool_calls:
            self._calls.add(completion.index)
        choice = ChatChoice(
            index=completion.index,
            message=AnswerMessage(**found.as_message()),
            logprobs=self._logprobs(completion),
            finish_reason=self._finish_reason(completion),
            stop_reason=completion.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = completion.token_ids
        return choice

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        # A call that was asked for by its name is no reason to OpenAI, nor to vLLM.
        calls = completion.finish_reason == "stop" and completion.index in self._calls and not self._tools.named
        return "tool_calls" if calls else completion.finish_reason

    def _logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        if completion.logprobs is None:
            return None
        return chat_logprobs(completion.token_ids, completion.logprobs, self._body.top_logprobs or 0, self._tokens)
