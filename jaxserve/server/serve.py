"""`jaxserve serve`: from settings to a server that runs until it is told to stop."""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from jaxserve.checkpoint.tokenizer import import_tokenizers, load_tokenizer
from jaxserve.config import DEMO_MODEL, EngineConfig
from jaxserve.engine.input_processor import InputProcessor, chat_format
from jaxserve.errors import InputError
from jaxserve.progress import ProgressBars
from jaxserve.server import logs
from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.connections import PunctualProtocol
from jaxserve.server.core.client import EngineClient
from jaxserve.server.core.messages import Ready
from jaxserve.server.core.process import CoreFailed, CoreProcess
from jaxserve.server.keys import ApiKeys

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5  # for clients to read what they are being sent, once the server stops


def run(config: EngineConfig, server: ServerConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; `SystemExit` with a line that says why, if the engine ends by itself."""
    logs.configure(server.log_level, server.log_format)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that either unwinds the stack
    # First what may be wrong with the settings, since loading takes long.
    keys = ApiKeys.read(server.api_key_file) if server.api_key_file is not None else None
    _check_certificate(server)
    listener = _bind(server.host, server.port)
    with started_engine(config, server) as engine:
        _Server(engine, server, keys).run(sockets=[listener])


@contextlib.contextmanager
def started_engine(config: EngineConfig, server: ServerConfig) -> Iterator[EngineClient]:
    """An engine in a process of its own, which ends with the block; `SystemExit` if it has ended by itself before."""
    served_name(config, server)  # refuses what would be found out only when all is loaded
    with CoreProcess() as core:
        # What loading the tokenizer needs takes seconds to import: that happens while the core loads.
        importing = threading.Thread(target=import_tokenizers, daemon=True)
        importing.start()
        try:
            with ProgressBars() as progress:
                ready = core.load(config, server, progress)
        except CoreFailed as error:
            raise SystemExit(f"jaxserve: {error}") from None
        logger.info(ready.attention)
        importing.join()
        tokenizer = _tokenizer(ready)
        inputs = InputProcessor(tokenizer, ready.limits, chat_format(tokenizer, ready.config))
        engine = EngineClient(core.channel, ready, inputs, server)
        yield engine
        if engine.has_failed:
            raise SystemExit(f"jaxserve: the engine process {core.end()}, and the server with it")


def served_name(config: EngineConfig, server: ServerConfig) -> str:
    """What clients call the model; `InputError` if an adapter has that name."""
    name = server.served_model_name or Path(config.model or DEMO_MODEL).expanduser().resolve().name
    if name in config.adapters:
        raise InputError(f"lora_modules has an adapter {name!r}, which is the model's own name; give it another one")
    return name


def _check_certificate(server: ServerConfig) -> None:
    if server.ssl_certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
        except OSError as error:
            files = " and ".join(filter(None, (server.ssl_certfile, server.ssl_keyfile)))
            raise InputError(f"cannot use the certificate of {files} ({error}); give PEM files") from error


def _tokenizer(ready: Ready) -> Any:
    if ready.config.skip_tokenizer_init or ready.config.tokenizer is None:
        return None
    return load_tokenizer(Path(ready.config.tokenizer))


class _Server(uvicorn.Server):
    """Says when it is ready. Once told to stop, it lets running requests end, and ends them when their time is up."""

    def __init__(self, engine: EngineClient, config: ServerConfig, keys: ApiKeys | None):
        self._engine, self._settings = engine, config
        self._name = served_name(engine.ready.config, config)
        self._in_a_hurry = False
        super().__init__(
            uvicorn.Config(
                build_app(engine, self._name, config, keys),
                http=functools.partial(PunctualProtocol, seconds=config.read_timeout + _GRACE_SECONDS),  # type: ignore[arg-type]
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM."""
        self._in_a_hurry = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what start-up has made stays: no collection has to walk it
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        for listener in sockets or ():
            scheme = "https" if self.config.is_ssl else "http"
            print(f"Serving {self._name} on {scheme}://{host}:{listener.getsockname()[1]}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        return self._engine.has_failed or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._engine.has_failed:
            await self._drain()
        self._engine.close()
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        """Wait for running requests. Meanwhile the server answers, so that balancers see that it takes no others."""
        self._engine.stop_taking_requests()
        end = time.monotonic() + self._settings.drain_timeout
        if count := self._engine.unfinished:
            logger.warning(
                "stopping once %d completions have ended, or in %g seconds; a second signal stops at once",
                count,
                self._settings.drain_timeout,
            )
        while self._engine.unfinished and not self._in_a_hurry and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); give another host or port") from error
    return listener
