"""Why a request that is in order is not served."""

_SOON = 5  # seconds


class Unserved(Exception):
    """The message is one sentence and `status` HTTP's number for it; in `retry_after` seconds things may be better.

    `reason` is the setting that forbids it, or another name for what happened, for metrics.
    """

    status = 500
    retry_after: int | None = None
    reason = "engine_failed"


class EngineDead(Unserved):
    """The engine does not run, so no request can be served."""


class Overloaded(Unserved):
    """As much waits as may."""

    status, retry_after = 429, _SOON

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class ShuttingDown(Unserved):
    """The server takes nothing on any more."""

    status, retry_after, reason = 503, _SOON, "shutting_down"


class NoPlaceInTime(Unserved):
    """The request has waited for its first step for as long as it may."""

    status, retry_after, reason = 503, _SOON, "queue_timeout"


class GrammarFailed(Unserved):
    """An answer has come to where its grammar cannot be followed any further."""

    reason = "grammar_failed"


class TookTooLong(Unserved):
    """The request has taken as long as it may."""

    status, reason = 504, "request_timeout"
