"""How many of an answer's tokens are reasoning, told from the token ids."""

import abc
from collections.abc import Callable, Sequence


class ReasoningTokens(abc.ABC):
    def __init__(self) -> None:
        self.count = 0

    @abc.abstractmethod
    def push(self, token_ids: Sequence[int]) -> None:
        """Take in the answer's next tokens."""


class BetweenTags(ReasoningTokens):
    """Reasoning from an opening tag that comes first, or from the beginning with `inside`, to the closing tag."""

    def __init__(self, open_id: int, close_id: int, *, inside: bool):
        super().__init__()
        self._open_id, self._close_id = open_id, close_id
        self._inside, self._over = inside, False

    def push(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if self._over:
                return
            self._inside = self._inside or token == self._open_id
            self.count += self._inside
            self._over = not self._inside or token == self._close_id


class InChannel(ReasoningTokens):
    """What gpt-oss writes into the channel of analysis, without the headers."""

    def __init__(self, channel_id: int, message_id: int, end_ids: frozenset[int], decode: Callable[[list[int]], str]):
        super().__init__()
        self._channel_id, self._message_id, self._end_ids = channel_id, message_id, end_ids
        self._decode = decode
        self._header: list[int] = []
        self._in_header = self._in_reasoning = False

    def push(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if token == self._channel_id:
                self._header, self._in_header, self._in_reasoning = [], True, False
            elif token == self._message_id:
                self._in_reasoning = self._in_header and self._decode(self._header).strip() == "analysis"
                self._in_header = False
            elif token in self._end_ids:
                self._in_reasoning = False
            elif self._in_header:
                self._header.append(token)
            else:
                self.count += self._in_reasoning
