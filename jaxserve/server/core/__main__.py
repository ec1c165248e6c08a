"""The engine core's process: `python -m jaxserve.server.core FD`, with one end of a socket pair as FD."""

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from jaxserve.errors import InputError
from jaxserve.server import logs
from jaxserve.server.core.channel import Channel, Closed
from jaxserve.server.core.loop import CoreLoop, describe
from jaxserve.server.core.messages import CannotLoad, Progress, Start, ToCore

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

logger = logging.getLogger("jaxserve.core")

_SECONDS_TO_END = 5  # for the loop, once the server has gone


def main(fd: int) -> int:
    """Load what the first message says, and serve until the socket is closed; the exit status."""
    # Who ends the server may signal all processes of its group or unit; the server then says when this one may go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    serving = threading.Event()
    threading.Thread(target=_end_with_server, args=(connection, serving), daemon=True).start()
    channel = Channel[ToCore](connection, ToCore)
    try:
        (start,) = channel.receive(wait=True)
        engine = _load(start, channel)
        channel.send(describe(engine))
    except InputError as error:
        channel.send(CannotLoad(str(error)))
        return 2
    except Closed:
        return 1
    serving.set()
    try:
        CoreLoop(engine, channel).run()
    except InputError as error:  # of several processes, another one has ended
        logger.error("the engine has failed: %s", error)
        return 1
    except Exception:
        logger.exception("the engine has failed")
        return 1
    engine.close()
    return 0


def _load(start: ToCore, channel: Channel[ToCore]) -> "Engine":
    if not isinstance(start, Start):
        raise TypeError(f"the server began with {type(start).__name__}")
    logs.configure(start.log_level, start.log_format)
    from jaxserve.engine.engine import Engine  # here, since they bring JAX with them
    from jaxserve.engine.startup import load

    lock = threading.Lock()  # weights are loaded on another thread than programs are compiled on

    def on_progress(stage: str, done: int, total: int) -> None:
        with lock:
            channel.send(Progress(stage, done, total))

    engine = Engine(load(start.config, on_progress))
    engine.grammars.prepare()  # the first request with one would hold up all others
    return engine


def _end_with_server(connection: socket.socket, serving: threading.Event) -> None:
    """End the process when the server has gone and the loop does not notice: in a step that hangs, or while loading."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    if serving.is_set():
        time.sleep(_SECONDS_TO_END)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
