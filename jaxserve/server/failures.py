"""Why a request that is in order is not served."""

_SOON = 5  # seconds


class Unserved(Exception):
    """The message is one sentence and `status` HTTP's number for it; in `retry_after` seconds things may be better."""

    status = 500
    retry_after: int | None = None


class EngineDead(Unserved):
    """The engine does not run, so no request can be served."""


class Overloaded(Unserved):
    """As much waits as may."""

    status, retry_after = 429, _SOON


class ShuttingDown(Unserved):
    """The server takes nothing on any more."""

    status, retry_after = 503, _SOON


class NoPlaceInTime(Unserved):
    """The request has waited for its first step for as long as it may."""

    status, retry_after = 503, _SOON


class GrammarFailed(Unserved):
    """An answer has come to where its grammar cannot be followed any further."""


class TookTooLong(Unserved):
    """The request has taken as long as it may."""

    status = 504
