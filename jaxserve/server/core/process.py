"""The engine core as a child process: started, brought up, ended."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType

from jaxserve.config import EngineConfig
from jaxserve.errors import InputError
from jaxserve.server.config import ServerConfig
from jaxserve.server.core.channel import Channel, Closed
from jaxserve.server.core.messages import CannotLoad, FromCore, Progress, Ready, Start

_SECONDS_TO_END = 10  # for the core to free the device, once nobody talks to it


class CoreFailed(Exception):
    """The engine process has ended by itself. The message is one sentence; what it wrote before says more."""


class CoreProcess:
    """An engine in a process of its own. A context manager: leaving it ends the process.

    The process is at the other end of `channel`, and ends when that is closed.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel[FromCore](ours, FromCore)
        with theirs:
            self._process = subprocess.Popen(
                # -P and the path: it imports what this process would, and nothing that lies where it was started
                [sys.executable, "-P", "-m", "jaxserve.server.core", str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # as its log: standard output is the server's
            )

    def load(self, config: EngineConfig, server: ServerConfig, on_progress: Callable[[str, int, int], None]) -> Ready:
        """Let it load; what the engine is. `InputError` if it cannot be, `CoreFailed` if the process fails at it."""
        try:
            self.channel.send(Start(config, server.log_level, server.log_format))
            while True:
                for message in self.channel.receive(wait=True):
                    match message:
                        case Progress():
                            on_progress(message.stage, message.done, message.total)
                        case CannotLoad():
                            raise InputError(message.sentence)
                        case Ready():
                            return message
        except Closed:
            raise CoreFailed(f"the engine process {self.end()} while it was loading") from None

    def end(self) -> str:
        """Close the channel and wait for the process; how it ended, as in "was killed by SIGKILL"."""
        self.channel.close()
        try:
            status = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "did not end by itself"
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def __enter__(self) -> "CoreProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
