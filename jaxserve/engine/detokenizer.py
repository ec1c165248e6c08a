"""Tokens to text, piece by piece: never a broken character, never text past a stop string."""

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

_CONTEXT = 8  # prompt tokens that tell the first new token whether a space goes before it


class TextStream:
    """The text of one completion as its tokens come.

    Text that could still turn out to be the beginning of a stop string is held back until that is settled.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
    ):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(list(prompt_token_ids[-_CONTEXT:]), skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is certain after this token, and the stop string that it completes, if any.

        With `may_stop` False, stop strings are let through.
        """
        self._held += self._stream.step(self._tokenizer, token_id) or ""
        if not self._stop:
            return self._release(len(self._held)), None
        found = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if not found or not may_stop:
            return self._release(len(self._held) - self._undecided()), None
        at, text = min(found)
        return self._held[: at + len(text) if self._include_stop else at], text

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(self._held), len(text) - 1), longest, -1):
                if self._held.endswith(text[:length]):
                    longest = length
                    break
        return longest
