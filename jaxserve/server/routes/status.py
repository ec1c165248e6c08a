"""`/v1/models` and `/health`."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.server.errors import ApiError
from jaxserve.server.protocol.models import ModelCard, ModelList
from jaxserve.server.routes.served import Served


class Status:
    def __init__(self, served: Served):
        self._served = served

    async def models(self, request: Request) -> Response:
        card = ModelCard(
            id=self._served.name,
            object="model",
            created=self._served.since,
            owned_by="jaxserve",
            max_model_len=self._served.engine.max_model_len,
        )
        return Response(ModelList(object="list", data=[card]).to_json(), media_type="application/json")

    async def health(self, request: Request) -> Response:
        if not self._served.engine.is_healthy:
            raise ApiError(503, "the engine does not run; restart the server")
        return JSONResponse({})
