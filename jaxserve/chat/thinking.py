"""Reasoning between tags before the answer, as Qwen3, DeepSeek-R1 and Magistral write it."""

from typing import NamedTuple

from jaxserve.chat.events import Reasoning
from jaxserve.chat.source import Parsing, Source


class Tags(NamedTuple):
    open: str
    close: str


THINK = Tags("<think>", "</think>")
MISTRAL_THINK = Tags("[THINK]", "[/THINK]")


def thinking(source: Source, tags: Tags, *, inside: bool) -> Parsing[None]:
    """The reasoning that an answer begins with, if it does. The tags go, and the line breaks around them.

    With `inside`, the prompt has opened it already. A tag further down is not one: an answer may speak of tags.
    """
    if not inside:
        at = yield from source.not_blank()
        if not (yield from source.begins_with(tags.open, at)):
            return
        source.take(at + len(tags.open))
    yield from source.skip("\n")
    if (yield from source.until(Reasoning, tags.close, trailing="\n")):
        yield from source.skip("\n")


def opens_thinking(turn: str, tags: Tags) -> bool:
    """Whether the last turn of a prompt leaves its reasoning open, so that what is written next is reasoning."""
    return turn.rfind(tags.open) > turn.rfind(tags.close)


def closes_thinking(turn: str, tags: Tags) -> bool:
    """Whether it has done with reasoning, as templates do where that is turned off."""
    return turn.rfind(tags.close) > turn.rfind(tags.open)
