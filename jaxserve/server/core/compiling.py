"""Requests whose grammars are compiled while the engine's loop steps on."""

import contextlib
import socket
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from jaxserve.server.core.messages import Add

if TYPE_CHECKING:  # they bring llguidance with them
    from llguidance import LLMatcher

    from jaxserve.engine.grammars import Grammars

type Compiled = "Future[LLMatcher | None]"


class Compiling:
    """Compiles in a thread of its own, one grammar after another, in the order of the requests.

    `fileno` is readable when there may be something to take. All else is for one thread.
    """

    def __init__(self, grammars: "Grammars"):
        self._grammars = grammars
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._queue: deque[tuple[Add, Compiled]] = deque()
        self._of_request: dict[str, tuple[Add, Compiled]] = {}
        self._done, self._worker_done = socket.socketpair()
        self._done.setblocking(False)
        self._worker_done.setblocking(False)

    def fileno(self) -> int:
        return self._done.fileno()

    @property
    def completions(self) -> int:
        """How many wait here."""
        return sum(add.params.n for add, _ in self._of_request.values())

    def put(self, add: Add) -> None:
        compiled = self._worker.submit(self._grammars.compiled, add.params)
        compiled.add_done_callback(self._wake)
        self._queue.append((add, compiled))
        self._of_request |= dict.fromkeys(add.requests, self._queue[-1])

    def drop(self, request_id: str) -> None:
        """Forget a request. No effect on one that is not here."""
        if request_id in self._of_request:
            add, compiled = self._of_request.pop(request_id)
            del add.requests[request_id]
            if not add.requests:
                compiled.cancel()  # unless it has begun

    def take(self) -> list[tuple[Add, Compiled]]:
        """The requests whose grammars are done, whether compiled or refused."""
        with contextlib.suppress(BlockingIOError):
            while self._done.recv(4096):
                pass
        taken = []
        while self._queue and self._queue[0][1].done():
            add, compiled = self._queue.popleft()
            for request_id in add.requests:
                del self._of_request[request_id]
            if add.requests:  # else all of them were dropped
                taken.append((add, compiled))
        return taken

    def close(self) -> None:
        """Forget all requests; what is being compiled has no effect."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._done.close()
        self._worker_done.close()

    def _wake(self, _: Compiled) -> None:
        with contextlib.suppress(OSError):  # it is full, which wakes as well; or closed
            self._worker_done.send(b"\0")
