"""`/metrics`"""

import asyncio
import contextlib

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.failures import EngineDead
from jaxserve.server.openapi import Operation, describes
from jaxserve.server.routes.served import Served
from jaxserve.server.telemetry.metrics import MEDIA_TYPE, Metrics

_PATIENCE = 1.0  # seconds for the engine to end a step


class Scrapes:
    def __init__(self, served: Served, metrics: Metrics):
        self._served, self._metrics = served, metrics

    @describes(Operation(summary="Metrics for Prometheus", answers="text/plain"))
    async def show(self, request: Request) -> Response:
        """The engine's numbers are those between two of its steps, or the last known ones if a step takes too long."""
        with contextlib.suppress(EngineDead, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                self._metrics.engine_is(await self._served.engine.stats())
        return Response(await self._metrics.text(), headers={"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"})
