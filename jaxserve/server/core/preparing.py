"""Messages that need work before the engine can take them, done while the engine's loop steps on."""

import contextlib
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxserve.server.core.messages import Add, LoadAdapter

type Prepared[T] = tuple[T, "Future[Any]"]


class Preparing:
    """Works in a thread of its own, for one message after another: grammars are compiled, and adapters read.

    `fileno` is readable when there may be something to take. All else is for one thread.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="preparing")
        self._queue: deque[Prepared[Add | LoadAdapter]] = deque()
        self._of_request: dict[str, Prepared[Add]] = {}
        self._done, self._worker_done = socket.socketpair()
        self._done.setblocking(False)
        self._worker_done.setblocking(False)

    def fileno(self) -> int:
        return self._done.fileno()

    @property
    def completions(self) -> int:
        """How many wait here."""
        return sum(add.params.n for add, _ in self._of_request.values())

    def put(self, message: Add | LoadAdapter, work: Callable[[], Any]) -> None:
        done = self._worker.submit(work)
        done.add_done_callback(self._wake)
        self._queue.append((message, done))
        if isinstance(message, Add):
            self._of_request |= dict.fromkeys(message.requests, (message, done))

    def drop(self, request_id: str) -> None:
        """Forget a request. No effect on one that is not here."""
        if request_id in self._of_request:
            add, done = self._of_request.pop(request_id)
            del add.requests[request_id]
            if not add.requests:
                done.cancel()  # unless it has begun

    def take(self) -> list[Prepared[Add | LoadAdapter]]:
        """The messages whose work is done, or has failed."""
        with contextlib.suppress(BlockingIOError):
            while self._done.recv(4096):
                pass
        taken = []
        while self._queue and self._queue[0][1].done():
            message, done = self._queue.popleft()
            if isinstance(message, Add):
                for request_id in message.requests:
                    del self._of_request[request_id]
                if not message.requests:
                    continue  # all of them were dropped
            taken.append((message, done))
        return taken

    def close(self) -> None:
        """Forget all messages; what is under way has no effect."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._done.close()
        self._worker_done.close()

    def _wake(self, _: "Future[Any]") -> None:
        with contextlib.suppress(OSError):  # it is full, which wakes as well; or closed
            self._worker_done.send(b"\0")
