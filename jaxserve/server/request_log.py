"""The outermost layer of the application: ids of requests, and a line in the log about each."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server import logs
from jaxserve.server.errors import FAILED

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+@-]{0,127}", re.ASCII)
_READ = frozenset({b"x-request-id", b"traceparent", b"tracestate"})
_ROUTINE = frozenset({"/health", "/ready", "/stats", "/metrics"})  # asked for every few seconds


class RequestLog:
    """Gives each request an id, which its response and everything logged for it has, and logs how it ended.

    `on_response` is told of its endpoint (None if it has none), its method and the status that it was answered with.
    """

    def __init__(self, app: ASGIApp, on_response: Callable[[Any, str, int], None]):
        self._app, self._on_response = app, on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _READ}
        given = headers.pop(b"x-request-id", "")
        current = logs.Current(
            given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex,
            {name.decode(): value for name, value in headers.items()},
        )
        logs.current.set(current)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", current.id.encode())]
            await send(message)

        start = time.perf_counter()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("this request failed")
            if status is not None:
                raise  # so that the connection is cut: the response cannot be made good any more
            await FAILED.response()(scope, receive, send_with_id)
        finally:
            _log(scope, status, time.perf_counter() - start, current)
            if status is not None:
                self._on_response(scope.get("endpoint"), scope["method"], status)


def _log(scope: Scope, status: int | None, seconds: float, request: logs.Current) -> None:
    path = scope["raw_path"].decode("ascii", "replace")  # percent-encoded, so that a line stays one
    level = logging.DEBUG if path in _ROUTINE else logging.INFO
    told = {"status": status, "seconds": round(seconds, 4)} | request.facts
    logger.log(level, "%s %s", scope["method"], path, extra={"facts": told})
