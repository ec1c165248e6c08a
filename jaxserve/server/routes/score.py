"""`/score`: how likely texts are after others, in the shape of vLLM's scores."""

import asyncio
import logging
import time

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.input_processor import Prompt
from jaxserve.engine.scoring import SCORING, paired, read_score, scored_tokens
from jaxserve.server.incoming import read_body
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.embeddings import EmbeddingUsage, ScoreEntry, ScoreList, ScoreRequest
from jaxserve.server.routes.reply import collected, json_response, new_id
from jaxserve.server.routes.served import Served

logger = logging.getLogger(__name__)


class Scores:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(summary="How likely texts are after others", takes=ScoreRequest, answers=ScoreList, errors=GENERATES)
    )
    async def create(self, request: Request) -> Response:
        body = await read_body(request, ScoreRequest)
        model = self._served.asked(body.model)
        id = new_id("score-")
        logger.debug("%s: user %r", id, body.user)
        engine = self._served.engine
        pairs = paired(body.text_1, body.text_2)
        tokens = await asyncio.to_thread(lambda: [scored_tokens(engine.inputs.tokenize, *pair) for pair in pairs])
        prompts: dict[str, Prompt] = {
            f"{id}-{number}": {"prompt_token_ids": token_ids} for number, (token_ids, _) in enumerate(tokens)
        }
        deltas = engine.generate(prompts, SCORING, priority=body.priority, adapter=model.adapter, stream=False)
        outputs = await collected(request, deltas)
        scores = [read_score(outputs[one], count) for one, (_, count) in zip(prompts, tokens, strict=True)]
        total = sum(len(token_ids) for token_ids, _ in tokens)
        answer = ScoreList(
            id=id,
            object="list",
            created=int(time.time()),
            model=model.name,
            data=[
                ScoreEntry(
                    object="score",
                    index=index,
                    score=found.score,
                    is_greedy=found.is_greedy,
                    token_logprobs=found.logprobs,
                )
                for index, found in enumerate(scores)
            ],
            usage=EmbeddingUsage(prompt_tokens=total, total_tokens=total),
        )
        return json_response(answer)
