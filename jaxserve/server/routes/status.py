"""`/v1/models`, `/version`, `/health` and `/ready`."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import jaxserve
from jaxserve.server.errors import ApiError
from jaxserve.server.failures import EngineDead
from jaxserve.server.openapi import Operation, describes
from jaxserve.server.protocol.models import ModelCard, ModelList
from jaxserve.server.routes.reply import json_response
from jaxserve.server.routes.served import Asked, Served


class Status:
    def __init__(self, served: Served):
        self._served = served

    @describes(Operation(summary="The one model, and its adapters", answers=ModelList))
    async def models(self, request: Request) -> Response:
        served = [
            self._served.card(Asked(self._served.name)),
            *(self._served.card(Asked(name, name)) for name in self._served.adapters),
        ]
        return json_response(ModelList(object="list", data=served))

    @describes(Operation(summary="The model of this name", answers=ModelCard, errors=(404,)))
    async def model(self, request: Request) -> Response:
        return json_response(self._served.card(self._served.asked(request.path_params["model"])))

    @describes(Operation(summary="The server's version", answers=dict[str, str]))
    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": jaxserve.__version__})

    @describes(Operation(summary="Whether the engine runs", answers=dict[str, Any], errors=(503,)))
    async def health(self, request: Request) -> Response:
        """Good once the engine has shown that it steps, or has nothing to do and answers."""
        try:
            await self._served.engine.check_health()
        except EngineDead as error:
            raise ApiError(503, str(error)) from None
        return JSONResponse({})

    @describes(Operation(summary="Whether requests are taken", answers=dict[str, Any], errors=(503,)))
    async def ready(self, request: Request) -> Response:
        """Good while requests are taken, which ends before the server does."""
        if not self._served.engine.takes_requests:
            raise ApiError(503, "the server takes no requests; ask another one")
        return JSONResponse({})
