"""`/v1/models`, `/health` and `/ready`."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.server.errors import ApiError
from jaxserve.server.failures import EngineDead
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
        """Good once the engine has shown that it steps, or has nothing to do and answers."""
        try:
            await self._served.engine.check_health()
        except EngineDead as error:
            raise ApiError(503, str(error)) from None
        return JSONResponse({})

    async def ready(self, request: Request) -> Response:
        """Good while requests are taken, which ends before the server does."""
        if not self._served.engine.takes_requests:
            raise ApiError(503, "the server takes no requests; ask another one")
        return JSONResponse({})
