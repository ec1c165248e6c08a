"""An engine core in a thread, for tests that look into the engine or say when it steps."""

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from jaxserve.server.config import ServerConfig
from jaxserve.server.core.channel import Channel
from jaxserve.server.core.client import EngineClient
from jaxserve.server.core.loop import CoreLoop, describe
from jaxserve.server.core.messages import FromCore, ToCore


class CoreThread:
    """The very loop that the engine's process runs, and the client at the other end of its socket."""

    def __init__(self, engine: Any, **settings: Any):
        ours, theirs = socket.socketpair()
        config = ServerConfig.from_settings(settings)
        self.client = EngineClient(Channel(ours, FromCore), describe(engine), engine.inputs, config)
        self.error: BaseException | None = None  # what the loop has ended with
        self._loop = CoreLoop(engine, Channel(theirs, ToCore))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def core_thread(engine: Any, **settings: Any) -> Iterator[CoreThread]:
    """Once its client is closed, the thread has to end. The settings are `ServerConfig`'s."""
    core = CoreThread(engine, **settings)
    yield core
    core.join()


@contextlib.asynccontextmanager
async def running(engine: Any, **settings: Any) -> AsyncIterator[EngineClient]:
    """The client of an engine in a thread, on the event loop of the test."""
    with core_thread(engine, **settings) as core:
        async with core.client as client:
            yield client
