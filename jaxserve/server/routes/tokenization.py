"""`/tokenize`, `/detokenize` and `/tokenizer_info`"""

import asyncio
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import InputError
from jaxserve.server.errors import validation_error
from jaxserve.server.incoming import read_body
from jaxserve.server.openapi import Operation, describes
from jaxserve.server.protocol.chat import ChatCompletionRequest
from jaxserve.server.protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from jaxserve.server.routes.reply import json_response
from jaxserve.server.routes.served import Served
from jaxserve.server.routes.turn import Turn


class Tokenization:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(
            summary="The tokens of a text or a conversation",
            takes=TokenizeRequest,
            answers=TokenizeResponse,
            errors=(404,),
        )
    )
    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeRequest)
        self._served.asked(body.model)
        engine = self._served.engine
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            token_ids = await engine.tokenize(body.prompt, add_special_tokens=special)
        else:
            token_ids = await self._render(body)
        # A text may be of any length here, and millions of tokens take seconds to write, which nobody is to wait for.
        return await asyncio.to_thread(self._answer, token_ids, with_texts=bool(body.return_token_strs))

    def _answer(self, token_ids: list[int], *, with_texts: bool) -> Response:
        max_model_len = self._served.engine.max_model_len
        answer = TokenizeResponse(count=len(token_ids), max_model_len=max_model_len, tokens=token_ids)
        if with_texts:
            answer.token_strs = self._tokenizer.convert_ids_to_tokens(token_ids)
        return json_response(answer)

    @describes(
        Operation(summary="The text of tokens", takes=DetokenizeRequest, answers=DetokenizeResponse, errors=(404,))
    )
    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest)
        self._served.asked(body.model)
        return json_response(DetokenizeResponse(prompt=await self._served.engine.detokenize(body.tokens)))

    @describes(Operation(summary="What the tokenizer is", answers=TokenizerInfo, errors=(400,)))
    async def info(self, request: Request) -> Response:
        tokenizer = self._tokenizer
        return json_response(
            TokenizerInfo(
                tokenizer_class=type(tokenizer).__name__,
                vocab_size=len(tokenizer),
                max_model_len=self._served.engine.max_model_len,
                bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
                pad_token=tokenizer.pad_token,
                unk_token=tokenizer.unk_token,
                chat_template=self._served.engine.chat.template,
            )
        )

    async def _render(self, body: TokenizeRequest) -> list[int]:
        try:
            conversation = body.conversation()
        except ValidationError as error:
            raise validation_error(error, ChatCompletionRequest) from None
        turn = Turn(
            messages=[message.model_dump(exclude_none=True) for message in conversation.messages],
            sampling={},
            tools=conversation.called(),
            template=conversation.template_arguments(),
        )
        return await turn.render(self._served.engine)

    @property
    def _tokenizer(self) -> Any:
        tokenizer = self._served.engine.inputs.tokenizer
        if tokenizer is None:
            raise InputError("this engine was started with skip_tokenizer_init=True and has no tokenizer")
        return tokenizer
