"""gpt-oss' channels: analysis is reasoning, final is content, and a message to a recipient is a tool call.

<|channel|>analysis<|message|>...<|end|>
<|start|>assistant to=functions.NAME<|channel|>commentary<|message|>{...}<|call|>
"""

import re

from jaxserve.chat.calls import Calls
from jaxserve.chat.events import CallArguments, Content, Event, Reasoning
from jaxserve.chat.source import Parsing, Source

START, CHANNEL, MESSAGE, CONSTRAIN, END = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, "<|call|>", "<|return|>")
ENDS = (END, "<|call|>", "<|return|>", START)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


def harmony(source: Source, calls: Calls | None) -> Parsing[None]:
    """All messages of a turn. It begins after `<|start|>`, within the header. Without `calls` there are no tools."""
    separator: dict[type, str] = {Reasoning: "", Content: ""}
    while True:
        header = yield from _header(source)
        if header is None:
            return
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient and calls:
            yield from _call(source, calls, recipient.group(1))
        else:
            # Commentary that goes to nobody is what the user is told before a call.
            kind = Reasoning if channel and channel.group(1) == "analysis" else Content
            yield from _message(source, kind, separator[kind])
            separator[kind] = "\n"


def _header(source: Source) -> Parsing[str | None]:
    """What comes before the next `<|message|>`, with the markers in it; None if none comes."""
    while (at := source.text.find(MESSAGE)) < 0:
        if source.ended:
            if not any(marker in source.text for marker in MARKERS):  # no header at all
                yield from source.literally(source.text.removeprefix("assistant"))
            return None
        yield None
    return source.take(at + len(MESSAGE))


def _message(source: Source, kind: type[Reasoning] | type[Content], separator: str) -> Parsing[None]:
    for event in source.until(kind, *ENDS):
        if separator and isinstance(event, kind):
            yield kind(separator)
            separator = ""
        yield event


def _call(source: Source, calls: Calls, name: str) -> Parsing[None]:
    begin = calls.begin(name)
    yield begin

    def arguments(text: str) -> Event:
        return CallArguments(begin.index, text)

    empty = True
    for event in source.until(arguments, *ENDS):
        empty = empty and event is None
        yield event
    if empty:
        yield CallArguments(begin.index, "{}")
