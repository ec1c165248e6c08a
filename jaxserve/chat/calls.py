"""A tool call as a JSON object with a name and arguments, read while it comes."""

import json
import re
from collections.abc import Callable

from jaxserve.chat.events import CallArguments, CallBegin
from jaxserve.chat.source import Parsing, Source

_ARGUMENTS = ("arguments", "parameters")
_TELLING = re.compile(r'["\\{}\[\]]')  # what decides where a JSON value ends
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LONGEST_STRING = 1024  # of keys and names; longer ones are none
_AFTER_SCALAR = re.compile(r"[,}\]\s]")


class Calls:
    """Numbers an answer's calls and gives them ids."""

    def __init__(self, names: frozenset[str], make_id: Callable[[], str]):
        self.names = names  # of the tools that the request has
        self._make_id = make_id
        self._count = 0

    def begin(self, name: str, id: str | None = None) -> CallBegin:
        call = CallBegin(self._count, id or self._make_id(), name)
        self._count += 1
        return call


def read_call(source: Source, calls: Calls, at: int, *, known_only: bool = False) -> Parsing[int]:
    """A call whose brace is at index `at`; returns the index after it, or -1 if it is none, and then nothing was taken.

    The call is certain, and its arguments are passed on as they come, once its name is known and the object of its
    arguments begins. What is wrong with it later stays as the model wrote it. With `known_only`, only the request's
    tools are called: so that JSON which happens to have a name is told from a call.
    """
    name, arguments, begun = None, "{}", False
    while True:
        at = yield from source.not_blank(at + 1)  # after the brace or a comma
        key, at = yield from _string(source, at)
        at = yield from source.not_blank(at)
        if key is None or not source.text.startswith(":", at):
            return at if begun else -1
        at = yield from source.not_blank(at + 1)
        if key == "name" and not begun:
            name, at = yield from _string(source, at)
            if not name or (known_only and name not in calls.names):
                return -1
        elif key in _ARGUMENTS and name and not begun and source.text.startswith("{", at):
            source.take(at)
            begin = calls.begin(name)
            yield begin
            yield from stream_object(source, begin.index)
            at, begun = 0, True
        else:
            start, at = at, (yield from _value_end(source, at))
            if key in _ARGUMENTS and not begun:
                arguments = source.text[start:at]
        at = yield from source.not_blank(at)
        if source.text.startswith("}", at):
            at += 1
            break
        if not source.text.startswith(",", at):
            return at if begun else -1
    if begun:
        return at
    written = _as_object(arguments)
    if name is None or written is None:
        return -1
    begin = calls.begin(name)
    yield begin
    yield CallArguments(begin.index, written)
    return at


def stream_object(source: Source, index: int) -> Parsing[None]:
    """The JSON object that the text begins with, as the arguments of call `index`."""
    nesting = _Nesting()
    while True:
        end = nesting.end(source.text, 0)
        if piece := source.take(end if end >= 0 else len(source.text)):
            yield CallArguments(index, piece)
        if end >= 0 or source.ended:
            return
        yield None


class _Nesting:
    """Finds the end of a JSON object, array or string, however it is cut."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escapes = False

    def end(self, text: str, at: int) -> int:
        """The index after the value, or -1 if it goes on; `at` is where the text begins that it has not been shown."""
        if self._escapes and at < len(text):
            at, self._escapes = at + 1, False
        while found := _TELLING.search(text, at):
            at, character = found.end(), found.group()
            if character == "\\":
                if self._in_string:
                    self._escapes = at == len(text)
                    at += 1
                continue
            if character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if character in "{[" else -1
            if self._depth <= 0 and not self._in_string:
                return at
        return -1


def _string(source: Source, at: int) -> Parsing[tuple[str | None, int]]:
    """The string at `at` and the index after it; None if there is none."""
    while not (found := _STRING.match(source.text, at)):
        if source.ended or source.text[at : at + 1] not in ("", '"') or len(source.text) - at > _LONGEST_STRING:
            return None, at
        yield None
    try:
        return json.loads(found.group(), strict=False), found.end()
    except ValueError:
        return None, at


def _value_end(source: Source, at: int) -> Parsing[int]:
    """The index after the JSON value at `at`."""
    nesting, seen = _Nesting(), at
    nested = source.text[at : at + 1] in ('"', "{", "[")
    while True:
        if nested:
            end = nesting.end(source.text, seen)
        else:
            found = _AFTER_SCALAR.search(source.text, seen)
            end = found.start() if found else -1
        if end >= 0:
            return end
        seen = len(source.text)
        if source.ended:
            return seen
        yield None


def _as_object(arguments: str) -> str | None:
    """Arguments as the text of a JSON object, if they are one, or one in a string, or null."""
    try:
        value = json.loads(arguments)
        if isinstance(value, str):
            arguments, value = value, json.loads(value)
    except ValueError:
        return None
    if value is None:
        return "{}"
    return arguments if isinstance(value, dict) else None
