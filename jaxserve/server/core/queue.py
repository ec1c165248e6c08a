"""How much may wait for the engine."""

from types import TracebackType

from jaxserve.errors import InputError
from jaxserve.server.failures import Overloaded


class Queue:
    """Bounds what waits: completions beyond the engine's slots, and tokens of prompts that have not begun."""

    def __init__(self, *, slots: int, max_requests: int, max_tokens: int):
        self._slots, self._max_requests, self._max_tokens = slots, max_requests, max_tokens
        self.requests = 0  # completions that have not ended, waiting or not
        self.tokens = 0  # that wait

    def place(self, requests: int) -> "Place":
        """For so many completions of one caller; `Overloaded` if there is none, `InputError` if there never is."""
        if requests > self._max_requests:
            raise InputError(
                f"the request is for {requests} completions and at most {self._max_requests} may wait; ask for fewer "
                "at a time"
            )
        if self.requests + requests > self._slots + self._max_requests:
            waiting = max(0, self.requests - self._slots)
            raise Overloaded(
                f"{waiting} completions wait and at most {self._max_requests} may; try again later",
                "max_queued_requests",
            )
        return Place(self, requests)

    def check_tokens(self, tokens: int) -> None:
        """`Overloaded` if so many more cannot wait. A prompt that would wait alone may be of any length."""
        if self.tokens and self.tokens + tokens > self._max_tokens:
            raise Overloaded(
                f"{self.tokens} prompt tokens wait and at most {self._max_tokens} may; try again later",
                "max_queued_tokens",
            )


class Place:
    """What one caller holds of a queue. A context manager; leaving it gives all of it back."""

    def __init__(self, queue: Queue, requests: int):
        self._queue = queue
        self._requests = self._tokens = 0
        self._change(requests, 0)

    def take_tokens(self, tokens: int) -> None:
        """Its prompts' tokens, once they are known; `Overloaded` if they are too many."""
        self._queue.check_tokens(tokens)
        self._change(0, tokens)

    def begin(self, tokens: int) -> None:
        """A prompt of so many tokens waits no longer."""
        self._change(0, -tokens)

    def end(self, requests: int) -> None:
        """So many completions have ended."""
        self._change(-requests, 0)

    def _change(self, requests: int, tokens: int) -> None:
        self._requests += requests
        self._queue.requests += requests
        self._tokens += tokens
        self._queue.tokens += tokens

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._change(-self._requests, -self._tokens)
