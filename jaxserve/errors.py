"""The one kind of error that is the user's to fix."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was given cannot be served. The message is one sentence: what was given, what is allowed, what to do.

    The command line prints it without a traceback and the server answers it with status 400, and with the name of the
    `field` that is to be mended, where it is certain; else that is what the sentence begins with, if it is a field.
    """

    def __init__(self, sentence: str, *, field: str | None = None):
        super().__init__(sentence)
        self.field = field


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
