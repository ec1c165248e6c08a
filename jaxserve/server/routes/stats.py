"""`/stats`"""

import dataclasses

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.server.openapi import Operation, describes
from jaxserve.server.routes.served import Served
from jaxserve.stats import EngineStats


class Stats:
    def __init__(self, served: Served):
        self._served = served

    @describes(Operation(summary="Where the engine stands, in numbers", answers=EngineStats))
    async def show(self, request: Request) -> Response:
        stats = await self._served.engine.stats()
        return JSONResponse(dataclasses.asdict(stats), headers={"Cache-Control": "no-store"})
