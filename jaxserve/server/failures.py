"""Why a request that is in order is not served."""


class Unserved(Exception):
    """The message is one sentence, `status` HTTP's number for it."""

    status = 500


class EngineDead(Unserved):
    """The engine does not run, so no request can be served."""
