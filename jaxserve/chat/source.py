"""Text that is read while it comes.

Parsers are generators over a `Source`. They yield events, and None when they cannot go on without more text. Since they
see one text, and never where it was cut, they find the same in it however it comes.
"""

import functools
import re
from collections.abc import Callable, Generator

from jaxserve.chat.events import Content, Event

type Parsing[T] = Generator[Event | None, None, T]

BLANK = " \t\r\n"
_MOST_WITHHELD = 64
_NOT_BLANK = re.compile(rf"[^{BLANK}]")


class Source:
    """What has come and was not taken yet. `dropped` are special tokens that carry nothing for a reader."""

    def __init__(self, dropped: tuple[str, ...] = ()):
        self.text = ""
        self.ended = False
        self.withheld = ""  # what `until` left out at the end of the text before a marker
        self._dropped = dropped

    def add(self, text: str) -> None:
        self.text += text

    def end(self) -> None:
        """No more comes."""
        self.ended = True

    def take(self, count: int) -> str:
        """Remove the first `count` characters."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def until(self, kind: Callable[[str], Event], *markers: str, trailing: str = "") -> Parsing[str | None]:
        """Events of the text before the first of `markers`, which is taken and returned; None if none comes.

        Characters of `trailing` right before the marker are left out, up to 64 of them.
        """
        marks = _marks(markers, self._dropped)
        while True:
            if found := marks.pattern.search(self.text):
                before, marker = self.take(found.end())[: found.start()], found.group()
                if marker in markers:
                    length = _without(before, trailing)
                    self.withheld = before[length:]
                    if length:
                        yield kind(before[:length])
                    return marker
                if before:
                    yield kind(before)
                continue
            if self.ended:
                if self.text:
                    yield kind(self.take(len(self.text)))
                return None
            decided = self.text[: len(self.text) - marks.undecided(self.text)]
            if length := _without(decided, trailing):
                yield kind(self.take(length))
            yield None

    def literally(self, text: str) -> Parsing[None]:
        """Text that turned out to be nothing but content."""
        if text := _marks((), self._dropped).pattern.sub("", text):
            yield Content(text)

    def begins_with(self, marker: str, at: int = 0) -> Parsing[bool]:
        """Whether `marker` stands at index `at`."""
        while not self.text.startswith(marker, at):
            if self.ended or not marker.startswith(self.text[at:]):
                return False
            yield None
        return True

    def not_blank(self, at: int = 0) -> Parsing[int]:
        """Index of the first character from `at` on that is not blank; the length of the text if none comes."""
        while not (found := _NOT_BLANK.search(self.text, at)):
            at = max(at, len(self.text))
            if self.ended:
                return at
            yield None
        return found.start()

    def skip(self, characters: str) -> Parsing[None]:
        """Take the characters that the text begins with, as long as they are among `characters`."""
        while True:
            self.text = self.text.lstrip(characters)
            if self.text or self.ended:
                return
            yield None


def _without(text: str, trailing: str) -> int:
    """The length of `text` without what of `trailing` it ends with."""
    return max(len(text.rstrip(trailing)), len(text) - _MOST_WITHHELD) if trailing else len(text)


class _Marks:
    """Strings to be found, the longest first where several begin at the same place."""

    def __init__(self, marks: tuple[str, ...]):
        self.pattern = re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or "(?!)")
        self._beginnings = {mark[:length] for mark in marks for length in range(1, len(mark))}
        self._longest = max(map(len, self._beginnings), default=0)

    def undecided(self, text: str) -> int:
        """Length of the longest end of `text` that may become one of the strings."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


@functools.lru_cache(maxsize=256)
def _marks(markers: tuple[str, ...], dropped: tuple[str, ...]) -> _Marks:
    return _Marks((*markers, *dropped))
