"""How families of models write tool calls into their text.

Each of these parsers reads to the end of the answer. What looks like a call and is none is content, as it was written.
"""

import re

from jaxserve.chat.calls import Calls, read_call, stream_object
from jaxserve.chat.events import Content
from jaxserve.chat.source import BLANK, Parsing, Source

_HERMES_OPEN, _HERMES_CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_MISTRAL_CALLS, _MISTRAL_ID, _MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.-]{0,256}")


def hermes(source: Source, calls: Calls) -> Parsing[None]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""
    while (yield from source.until(Content, _HERMES_OPEN, trailing=BLANK)):
        at = yield from source.not_blank()
        end = (yield from read_call(source, calls, at)) if source.text.startswith("{", at) else -1
        if end < 0:
            yield from source.literally(source.withheld + _HERMES_OPEN)
            continue
        source.take(end)
        at = yield from source.not_blank()
        while source.text.startswith("}", at):  # one brace too many is a common slip
            at = yield from source.not_blank(at + 1)
        if (yield from source.begins_with(_HERMES_CLOSE, at)):
            source.take(at + len(_HERMES_CLOSE))
            yield from source.skip(BLANK)
        elif at == len(source.text):
            source.take(at)


def llama3_json(source: Source, calls: Calls) -> Parsing[None]:
    """`{"name": ..., "parameters": {...}}`, several with semicolons between them, or the same after `<|python_tag|>`.

    Without the tag, only an answer that begins so, with the name of one of the request's tools, is a call.
    """
    tagged = False
    while True:
        at = yield from source.not_blank()
        if (yield from source.begins_with(_PYTHON_TAG, at)):
            source.take(at + len(_PYTHON_TAG))
            tagged = True
            continue
        end = -1
        if source.text.startswith("{", at):
            end = yield from read_call(source, calls, at, known_only=not tagged)
        if end >= 0:
            source.take(end)
            at = yield from source.not_blank()
            if at == len(source.text) or source.text.startswith(";", at):
                source.take(at + 1)
        elif (yield from source.until(Content, _PYTHON_TAG, trailing=BLANK)):
            tagged = True
        else:
            return


def mistral(source: Source, calls: Calls) -> Parsing[None]:
    """`[TOOL_CALLS]` before a JSON list of calls, or before each `name[ARGS]{...}`."""
    while (yield from source.until(Content, _MISTRAL_CALLS, trailing=BLANK)):
        marker = source.withheld + _MISTRAL_CALLS
        at = yield from source.not_blank()
        if source.text.startswith("[", at):
            begun = yield from _mistral_list(source, calls, at)
        else:
            begun = yield from _mistral_named(source, calls, at)
        if not begun:
            yield from source.literally(marker)


def _mistral_list(source: Source, calls: Calls, at: int) -> Parsing[bool]:
    begun = False
    while True:
        brace = yield from source.not_blank(at + 1)
        end = (yield from read_call(source, calls, brace)) if source.text.startswith("{", brace) else -1
        if end < 0:
            return begun
        source.take(end)
        begun = True
        at = yield from source.not_blank()
        if not source.text.startswith(",", at):
            if source.text.startswith("]", at) or at == len(source.text):
                source.take(at + 1)
            return begun


def _mistral_named(source: Source, calls: Calls, at: int) -> Parsing[bool]:
    name, at = yield from _word(source, at)
    id = None
    if (yield from source.begins_with(_MISTRAL_ID, at)):
        id, at = yield from _word(source, at + len(_MISTRAL_ID))
    if (yield from source.begins_with(_MISTRAL_ARGUMENTS, at)):
        at += len(_MISTRAL_ARGUMENTS)
    at = yield from source.not_blank(at)
    if not name or not source.text.startswith("{", at):
        return False
    source.take(at)
    begin = calls.begin(name, id)
    yield begin
    yield from stream_object(source, begin.index)
    return True


def _word(source: Source, at: int) -> Parsing[tuple[str, int]]:
    """The name or id at `at`, and the index after it."""
    while True:
        found = _NAME.match(source.text, at)
        end = found.end() if found else at
        if end < len(source.text) or source.ended:
            return source.text[at:end], end
        yield None
