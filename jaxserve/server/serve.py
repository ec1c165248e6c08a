"""`jaxserve serve`: from settings to a server that runs until it is told to stop."""

import contextlib
import importlib
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus

from jaxserve.checkpoint.tokenizer import load_tokenizer
from jaxserve.config import EngineConfig
from jaxserve.engine.input_processor import InputProcessor
from jaxserve.errors import InputError
from jaxserve.progress import ProgressBars
from jaxserve.server.app import build_app
from jaxserve.server.core.client import EngineClient
from jaxserve.server.core.messages import Ready
from jaxserve.server.core.process import CoreFailed, CoreProcess

_GRACE_SECONDS = 5  # for clients to read what they are being sent, once the server stops


def run(config: EngineConfig, *, host: str, port: int, served_model_name: str | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM. The name defaults to that of the model's directory.

    `SystemExit` with a line that says why, if the engine ends by itself.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that either unwinds the stack
    listener = _bind(host, port)  # first, since loading takes long
    with CoreProcess(config) as core:
        # A thread imports what loading the tokenizer needs, which takes seconds, while the core loads.
        threading.Thread(target=importlib.import_module, args=("transformers",), daemon=True).start()
        try:
            with ProgressBars() as progress:
                ready = core.wait_until_ready(progress)
        except CoreFailed as error:
            raise SystemExit(f"jaxserve: {error}") from None
        print(ready.attention, file=sys.stderr)
        engine = EngineClient(core.channel, ready, InputProcessor(_tokenizer(ready), ready.limits))
        name = served_model_name or Path(ready.config.model).resolve().name
        with contextlib.suppress(KeyboardInterrupt):
            _Server(engine, name, host).run(sockets=[listener])
        if engine.has_failed:
            raise SystemExit(f"jaxserve: the engine process {core.end()}, and the server with it")


def _tokenizer(ready: Ready) -> Any:
    if ready.config.skip_tokenizer_init or ready.config.tokenizer is None:
        return None
    return load_tokenizer(Path(ready.config.tokenizer))


class _Server(uvicorn.Server):
    """Says when it is ready, and ends the running requests when it stops."""

    def __init__(self, engine: EngineClient, name: str, host: str):
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

    async def on_tick(self, counter: int) -> bool:
        return self._engine.has_failed or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.close()
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
