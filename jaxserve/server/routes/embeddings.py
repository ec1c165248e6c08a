"""`/v1/embeddings`"""

import array
import base64
import logging
import sys

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.input_processor import Prompt
from jaxserve.engine.scoring import normalised
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.incoming import read_body
from jaxserve.server.openapi import GENERATES, Operation, describes
from jaxserve.server.protocol.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from jaxserve.server.routes.reply import collected, json_response, new_id
from jaxserve.server.routes.served import Served

logger = logging.getLogger(__name__)


class Embeddings:
    def __init__(self, served: Served):
        self._served = served

    @describes(
        Operation(summary="Embeddings of prompts", takes=EmbeddingRequest, answers=EmbeddingList, errors=GENERATES)
    )
    async def create(self, request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest)
        model = self._served.asked(body.model)
        id = new_id("embd-")
        logger.debug("%s: user %r", id, body.user)
        params = SamplingParams(max_tokens=1, pooling=body.pooling or "mean")
        prompts: dict[str, Prompt] = {
            f"{id}-{number}": given if isinstance(given, str) else {"prompt_token_ids": given}
            for number, given in enumerate(body.input)
        }
        deltas = self._served.engine.generate(
            prompts, params, priority=body.priority, adapter=model.adapter, stream=False
        )
        found = await collected(request, deltas)
        outputs = [found[request_id] for request_id in prompts]
        tokens = sum(len(output.prompt_token_ids) for output in outputs)
        answer = EmbeddingList(
            object="list",
            model=model.name,
            data=[_entry(index, output, body) for index, output in enumerate(outputs)],
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
        return json_response(answer)


def _entry(index: int, output: RequestOutput, body: EmbeddingRequest) -> Embedding:
    embedding = output.embedding or []
    if body.normalize is not False:
        embedding = normalised(embedding)
    return Embedding(
        object="embedding",
        index=index,
        embedding=_base64(embedding) if body.encoding_format == "base64" else embedding,
    )


def _base64(embedding: list[float]) -> str:
    numbers = array.array("f", embedding)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
