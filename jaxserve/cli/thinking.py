"""Telling a model's thinking from its answer while the text streams."""

from collections.abc import Iterator, Sequence
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


class ThinkingSplitter:
    """Cuts streamed text at `<think>` and `</think>`; the tags themselves and the blank lines after them go."""

    def __init__(self, *, inside: bool = False):
        self._inside = inside  # whether the text starts as thinking: some chat templates open it in the prompt
        self._held = ""  # what may be the beginning of a tag
        self._skip_blank = inside

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        """Pieces `(is thinking, text)` that are certain by now."""
        self._held += text
        while (at := self._held.find(self._tag)) >= 0:
            yield from self._piece(self._held[:at])
            self._held = self._held[at + len(self._tag) :]
            self._inside, self._skip_blank = not self._inside, True
        certain = len(self._held) - self._undecided()
        piece, self._held = self._held[:certain], self._held[certain:]
        yield from self._piece(piece)

    def flush(self) -> Iterator[tuple[bool, str]]:
        """What was held back, once no more text comes."""
        piece, self._held = self._held, ""
        yield from self._piece(piece)

    @property
    def _tag(self) -> str:
        return CLOSE if self._inside else OPEN

    def _piece(self, text: str) -> Iterator[tuple[bool, str]]:
        if self._skip_blank:
            text = text.lstrip("\n")
        if text:
            self._skip_blank = False
            yield self._inside, text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins the tag."""
        return next((n for n in range(len(self._tag) - 1, 0, -1) if self._held.endswith(self._tag[:n])), 0)


def split_thinking(text: str, *, inside: bool = False) -> list[tuple[bool, str]]:
    """The pieces of a whole text."""
    splitter = ThinkingSplitter(inside=inside)
    return [*splitter.push(text), *splitter.flush()]


def opens_thinking(tokenizer: Any, prompt_token_ids: Sequence[int]) -> bool:
    """Whether a rendered chat ends with an open `<think>`, so that what the model writes next is thinking."""
    return tokenizer.decode(prompt_token_ids[-8:]).rstrip().endswith(OPEN)
