"""`/v1/completions`"""

import contextlib
import logging
from collections.abc import Iterable
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.input_processor import Prompt
from jaxserve.outputs import CompletionOutput, Logprobs, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.core.client import EngineClient
from jaxserve.server.incoming import read_body
from jaxserve.server.logprobs import completion_logprobs, prompt_logprobs, prompt_offset
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.base import UsageWanted
from jaxserve.server.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from jaxserve.server.routes.reply import Counts, Deltas, Reply, answer, new_id
from jaxserve.server.routes.served import Served

logger = logging.getLogger(__name__)


class _Prompt(NamedTuple):
    for_engine: Prompt
    text: str | None  # of all of it, if the client sent that


class Completions:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(
            summary="Completions of prompts",
            takes=CompletionRequest,
            answers=Completion,
            streams=Completion,
            last_event=Reply.last_event,
            errors=GENERATES,
        )
    )
    async def create(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        model = self._served.asked(body.model)
        engine = self._served.engine
        params = SamplingParams(**(engine.sampling_defaults | body.sampling_settings()))
        prompts = [await self._prompt(body, params, prompt) for prompt in body.prompt]
        reply = _CompletionReply(body, params, model.name, prompts, engine)
        logger.debug("%s: user %r, %s", reply.id, body.user, params)
        deltas = engine.generate(
            reply.engine_prompts,
            params,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            adapter=model.adapter,
            stream=bool(body.stream),
        )
        if body.only_echoes:
            deltas = _without_completions(deltas)
        return await answer(request, reply, deltas, stream=body.stream)

    async def _prompt(self, body: CompletionRequest, params: SamplingParams, prompt: str | list[int]) -> _Prompt:
        engine, room = self._served.engine, body.truncate_prompt_tokens
        text = prompt if isinstance(prompt, str) else None
        if text is not None and room is None and body.add_special_tokens is not False:
            return _Prompt(text, text)
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            prompt = await engine.tokenize(prompt, add_special_tokens=special, must_fit=room is None)
        if room == -1:
            room = max(1, engine.max_model_len - (params.max_tokens or 1))
        if room is not None and len(prompt) > room:
            return _Prompt({"prompt_token_ids": prompt[-room:]}, None)
        return _Prompt({"prompt_token_ids": prompt}, text)


async def _without_completions(deltas: Deltas) -> Deltas:
    """The prompts alone: the engine makes a token at least, which the client neither gets nor is told of."""
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            delta.outputs = [
                CompletionOutput(output.index, logprobs=[], finish_reason="length") for output in delta.outputs
            ]
            yield delta


class _CompletionReply(Reply):
    """Each prompt is an engine request of its own; choice `number * n + i` is completion i of prompt `number`."""

    def __init__(
        self, body: CompletionRequest, params: SamplingParams, model: str, prompts: list[_Prompt], engine: EngineClient
    ):
        super().__init__(new_id("cmpl-", body.request_id), model)
        self.usage_in_chunks = body.include_usage is UsageWanted.EVERYWHERE
        self._body, self._params, self._prompts, self._engine = body, params, prompts, engine
        ids = [f"{self.id}-{number}" for number in range(len(prompts))]
        self.engine_prompts = {request_id: prompt.for_engine for request_id, prompt in zip(ids, prompts, strict=True)}
        self._numbers = {request_id: number for number, request_id in enumerate(ids)}
        self._prompt_logprobs: dict[str, list[Logprobs | None]] = {}  # by request id; they come with the first delta
        self._offsets: dict[int, int] = {}  # of each choice that has begun: where its next token's text begins

    def chunks(self, delta: RequestOutput) -> Iterable[Completion]:
        for output in delta.outputs:
            choice = self._choice(delta, output)
            if choice.text or choice.logprobs or choice.token_ids or choice.finish_reason:
                yield self._chunk([choice])

    def last_chunks(self, counts: Counts) -> Iterable[Completion]:
        if self._body.include_usage:
            chunk = self._chunk([])
            chunk.usage = counts.usage
            yield chunk

    def whole(self, outputs: list[RequestOutput], counts: Counts) -> Completion:
        choices = [self._choice(output, completion) for output in outputs for completion in output.outputs]
        completion = self._completion(sorted(choices, key=lambda choice: choice.index))
        completion.usage = counts.usage
        return completion

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        chunk = self._completion(choices)
        if self._body.include_usage:
            chunk.usage = None  # as OpenAI has it: in every chunk, and told in the last
        return chunk

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices)

    def _choice(self, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        """A completion, or what a step added to it. The first time, what is told of the prompt goes with it."""
        number = self._numbers[output.request_id]
        index = number * self._params.n + completion.index
        begins = index not in self._offsets
        echoes = bool(self._body.echo) and begins
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[output.request_id] = output.prompt_logprobs
        choice = CompletionChoice(
            index=index,
            text=self._prompt_text(number, output) + completion.text if echoes else completion.text,
            logprobs=self._logprobs(index, number, output, completion, echoes),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        if self._body.prompt_logprobs is not None:
            positions = self._prompt_logprobs[output.request_id]
            choice.prompt_logprobs = prompt_logprobs(output.prompt_token_ids, positions, self._body.prompt_logprobs)
        if self._body.return_token_ids:
            choice.token_ids = completion.token_ids
            if begins:
                choice.prompt_token_ids = output.prompt_token_ids
        return choice

    def _logprobs(
        self, index: int, number: int, output: RequestOutput, completion: CompletionOutput, echoes: bool
    ) -> CompletionLogprobs | None:
        offset = self._offsets.setdefault(index, 0)
        if completion.logprobs is None or self._body.logprobs is None:
            return None
        token_ids: list[int] = completion.token_ids
        positions: list[Logprobs | None] = [*completion.logprobs]
        if echoes:
            token_ids = output.prompt_token_ids + token_ids
            positions = self._prompt_logprobs[output.request_id] + positions
            offset = prompt_offset(output.prompt_token_ids, self._prompt_text(number, output), self._engine.tokens)
        logprobs, self._offsets[index] = completion_logprobs(
            token_ids,
            positions,
            self._body.logprobs,
            offset,
            self._engine.tokens,
            as_ids=bool(self._body.return_tokens_as_token_ids),
        )
        return logprobs

    def _prompt_text(self, number: int, output: RequestOutput) -> str:
        text = self._prompts[number].text
        return self._engine.decode(output.prompt_token_ids) if text is None else text
