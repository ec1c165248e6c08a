"""Parsers of each style without a tokenizer, and what they find."""

import functools
import itertools
from typing import Any

from jaxserve.chat.calls import Calls
from jaxserve.chat.events import Answer, Content, Event, Reasoning
from jaxserve.chat.harmony import MARKERS, harmony
from jaxserve.chat.parser import AnswerParser
from jaxserve.chat.source import Parsing, Source
from jaxserve.chat.styles import TOOLS
from jaxserve.chat.thinking import THINK, thinking

SPECIAL = {"mistral": ("<s>", "</s>", "[TOOL_CALLS]", "[ARGS]"), "llama3_json": ("<|eot_id|>", "<|python_tag|>")}
SPECIAL["harmony"] = (*MARKERS, "<|endoftext|>")


def parser(style: str, *, inside: bool = False, tools: bool = True, **options: Any) -> AnswerParser:
    """Of `harmony`, or of a style of tool calls after reasoning in `<think>` tags. The tools are add and get_time."""
    ids = map(str, itertools.count())
    calls = Calls(frozenset({"add", "get_time"}), lambda: next(ids))
    options = {"dropped": SPECIAL.get(style, ())} | options
    if style == "harmony":
        options = {"prompt": "assistant"} | options
        return AnswerParser(functools.partial(harmony, calls=calls if tools else None), **options)

    def parse(source: Source) -> Parsing[None]:
        yield from thinking(source, THINK, inside=inside)
        if tools:
            yield from TOOLS[style].parse(source, calls)
        yield from source.until(Content)

    return AnswerParser(parse, **options)


def found(parser: AnswerParser, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and name and arguments of each call."""
    answer = Answer()
    for event in [*itertools.chain.from_iterable(map(parser.push, pieces)), *parser.finish()]:
        answer.add(event)
    assert [call.id for call in answer.tool_calls] == [str(number) for number in range(len(answer.tool_calls))]
    return answer.reasoning, answer.content, [(call.name, call.arguments) for call in answer.tool_calls]


def joined(events: list[Event]) -> list[Any]:
    """The events, with neighbours of the same kind as one."""
    result: list[Any] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Reasoning | Content) and type(last) is type(event):
            result[-1] = type(event)(last.text + event.text)
        else:
            result.append(event)
    return result
