"""`jaxserve serve`: from settings to a server that runs until it is told to stop."""

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette

from jaxserve.config import EngineConfig
from jaxserve.errors import InputError
from jaxserve.progress import ProgressBars
from jaxserve.server.app import build_app
from jaxserve.server.async_engine import AsyncEngine

_GRACE_SECONDS = 5  # for clients to read what they are being sent, once the server stops


def run(config: EngineConfig, *, host: str, port: int, served_model_name: str | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM. The name defaults to that of the model's directory."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that either unwinds the stack
    listener = _bind(host, port)  # first, since loading takes long
    with _loaded(config, served_model_name) as (engine, name), contextlib.suppress(KeyboardInterrupt):
        _Server(engine, name, host).run(sockets=[listener])


@contextlib.contextmanager
def in_process(config: EngineConfig, served_model_name: str | None = None) -> Iterator[Starlette]:
    """The application on an engine of its own, for whoever calls it without a network."""
    with _loaded(config, served_model_name) as (engine, name):
        yield build_app(engine, name)


@contextlib.contextmanager
def _loaded(config: EngineConfig, served_model_name: str | None) -> Iterator[tuple[AsyncEngine, str]]:
    """The engine, and the name of its model."""
    from jaxserve.engine.engine import Engine  # here, since they bring JAX with them
    from jaxserve.engine.startup import load

    with ProgressBars() as progress:
        engine = Engine(load(config, progress))
    print(engine.attention, file=sys.stderr)
    try:
        yield AsyncEngine(engine), served_model_name or Path(str(engine.config.model)).resolve().name
    finally:
        engine.close()


class _Server(uvicorn.Server):
    """Says when it is ready, and ends the running requests when it stops."""

    def __init__(self, engine: AsyncEngine, name: str, host: str):
        app = build_app(engine, name)
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS)
        )
        self._engine, self._name, self._host = engine, name, host
        # sse-starlette would cut the streams off; here the engine ends them, each with an error that says why.
        AppStatus.disable_automatic_graceful_drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host = f"[{self._host}]" if ":" in self._host else self._host
        for listener in sockets or ():
            print(f"Serving {self._name} on http://{host}:{listener.getsockname()[1]}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._engine.close()
        await super().shutdown(sockets)


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); give another host or port") from error
    return listener
