"""Tokens to text, piece by piece: never a broken character, never text past a stop string."""

import codecs
import re
from collections.abc import Sequence

import tokenizers

_CONTEXT = 8  # prompt tokens that tell whether a text begins with the first new token or goes on with it
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenBytes:
    """What each token adds to the text before it, as UTF-8. Some tokens hold but a part of a character.

    The library's own stream of decoded tokens fails where SentencePiece's byte tokens make no character.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        # Decoders leave out the space before a text's first token: what a token adds shows behind another one.
        self._before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._before_length = len(self._decode(self._before))
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._bytes(token_id, self._decode([*self._before, token_id])[self._before_length :])
            self._known[token_id] = found
        return found

    def first(self, token_id: int) -> bytes:
        """What the token is at the beginning of a text."""
        return self._bytes(token_id, self._decode([token_id]))

    def text(self, token_id: int) -> str:
        """What the token adds, with a replacement character for what is no whole one."""
        return self[token_id].decode(errors="replace")

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _bytes(self, token_id: int, text: str) -> bytes:
        if _BROKEN not in text:
            return text.encode()
        token = self._tokenizer.id_to_token(token_id) or ""
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if all(symbol in _BYTES for symbol in token):
            return bytes(_BYTES[symbol] for symbol in token)
        return text.encode()  # the character itself is in the vocabulary


def _byte_level() -> dict[str, int]:
    """The bytes that GPT-2's alphabet, and that of all byte-level vocabularies since, has symbols for."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_level()


class TextStream:
    """The text of one completion as its tokens come.

    Text that could still turn out to be the beginning of a stop string is held back until that is settled, and so is
    the beginning of a character.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
    ):
        self._tokens = tokens
        self._skipped = tokens.special if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        before = [token for token in prompt_token_ids[-_CONTEXT:] if token not in self._skipped]
        self._begun = bool(before)
        # A character that the prompt begins and this completes is of this; if it stays broken, it was the prompt's.
        for token in before:
            self._decoder.decode(tokens[token])
        self._of_prompt = bool(self._decoder.getstate()[0])
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is certain after this token, and the stop string that it completes, if any.

        With `may_stop` False, stop strings are let through.
        """
        self._held += self._decode(token_id)
        if not self._stop:
            return self._release(len(self._held)), None
        found = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if not found or not may_stop:
            return self._release(len(self._held) - self._undecided()), None
        at, text = min(found)
        return self._held[: at + len(text) if self._include_stop else at], text

    def flush(self) -> str:
        """What was held back, once no more tokens come; but for a character that is not complete."""
        return self._release(len(self._held))

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._tokens[token_id] if self._begun else self._tokens.first(token_id))
        self._begun = True
        if text and self._of_prompt:
            self._of_prompt = False
            text = text.removeprefix(_BROKEN)
        return text

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
