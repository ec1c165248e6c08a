"""The one kind of error that is the user's to fix."""

import difflib
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Name(NamedTuple):
    """What an `InputError` calls a field of a request, for which an API may have another name."""

    text: str


class InputError(ValueError):
    """What was given cannot be served. The message is one sentence: what was given, what is allowed, what to do.

    The command line prints it without a traceback and the server answers it with status 400. It comes in parts, so that
    the names in it can be told from the text between them. `field` is what is to be mended, where that is certain: the
    name that the sentence begins with, or another that is given.
    """

    def __init__(self, *parts: str | Name, field: str | None = None):
        super().__init__(*parts)
        self.parts = parts
        self.field = parts[0].text if field is None and isinstance(parts[0], Name) else field

    def __str__(self) -> str:
        return self.told({})

    def told(self, names: Mapping[str, str]) -> str:
        """The sentence, with the names that are called otherwise in `names` called so."""
        return "".join(names.get(part.text, part.text) if isinstance(part, Name) else part for part in self.parts)


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, short enough to stand in a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
