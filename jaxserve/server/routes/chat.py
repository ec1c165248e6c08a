"""`/v1/chat/completions`"""

import logging
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.input_processor import Prompt
from jaxserve.errors import InputError
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.incoming import read_body
from jaxserve.server.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.base import Usage
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
from jaxserve.server.routes.reply import Reply, answer
from jaxserve.server.routes.served import Served

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
            errors=GENERATES,
        )
    )
    async def create(self, request: Request) -> Response:
        body = await read_body(request, ChatCompletionRequest)
        self._served.check_name(body.model)
        engine = self._served.engine
        if (body.top_logprobs or 0) > engine.max_logprobs:
            raise InputError(
                f"top_logprobs is {body.top_logprobs}, and this engine was started with "
                f"max_logprobs={engine.max_logprobs}; ask for fewer"
            )
        params = SamplingParams(**(engine.sampling_defaults | body.sampling_settings()))
        reply = _ChatReply(body, self._served.name)
        logger.debug("%s: user %r, %s", reply.id, body.user, params)
        messages = [message.for_template() for message in body.messages]
        token_ids = await engine.render_chat(messages, **body.template_arguments())
        prompts: dict[str, Prompt] = {reply.id: {"prompt_token_ids": token_ids}}
        deltas = engine.generate(prompts, params, priority=body.priority, stream=bool(body.stream))
        return await answer(request, reply, deltas, stream=body.stream, include_usage=body.include_usage)


class _ChatReply(Reply):
    """Choice i is completion i of the conversation."""

    def __init__(self, body: ChatCompletionRequest, model: str):
        super().__init__("chatcmpl", model)
        self._body = body
        self._begun: set[int] = set()  # choices whose role has been told

    def chunks(self, delta: RequestOutput) -> Iterable[ChatChunk]:
        for output in delta.outputs:
            if output.index not in self._begun:
                yield self._first_chunk(delta, output.index)
                self._begun.add(output.index)
            choice = ChatChunkChoice(
                index=output.index,
                delta=Delta(content=output.text) if output.text else Delta(),
                logprobs=self._logprobs(output),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
            if self._body.return_token_ids:
                choice.token_ids = output.token_ids
            if output.text or choice.logprobs or choice.token_ids or output.finish_reason:
                yield self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def whole(self, outputs: list[RequestOutput], usage: Usage) -> ChatCompletion:
        (output,) = outputs
        completion = ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(completion) for completion in output.outputs],
            usage=usage,
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
        choice = ChatChoice(
            index=completion.index,
            message=AnswerMessage(role="assistant", content=completion.text),
            logprobs=self._logprobs(completion),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = completion.token_ids
        return choice

    def _logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        if completion.logprobs is None:
            return None
        return chat_logprobs(completion.token_ids, completion.logprobs, self._body.top_logprobs or 0)
