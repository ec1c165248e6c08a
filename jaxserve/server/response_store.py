"""Responses that are kept, so that a conversation can go on from one or a client can ask for it again."""

import dataclasses
from collections import OrderedDict
from typing import Any

from jaxserve.server.protocol.responses import ResponseObject

MAX_RESPONSES = 1000
MAX_CHARACTERS = 64 * 2**20  # of all of them, with their conversations


@dataclasses.dataclass(frozen=True)
class StoredResponse:
    """`messages` is the conversation with its answer, without the instructions, which are each request's own."""

    response: ResponseObject
    messages: list[dict[str, Any]]

    @property
    def characters(self) -> int:
        return len(self.response.to_json()) + sum(len(repr(message)) for message in self.messages)


class ResponseStore:
    """Keeps as many as fit; the one that was not used for the longest time goes first."""

    def __init__(self, *, responses: int = MAX_RESPONSES, characters: int = MAX_CHARACTERS):
        self._most, self._most_characters = responses, characters
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._characters = 0

    def put(self, stored: StoredResponse) -> None:
        size = stored.characters
        self._stored[stored.response.id] = stored, size
        self._characters += size
        while self._stored and (len(self._stored) > self._most or self._characters > self._most_characters):
            _, (_, gone) = self._stored.popitem(last=False)
            self._characters -= gone

    def get(self, id: str) -> StoredResponse | None:
        if id not in self._stored:
            return None
        self._stored.move_to_end(id)
        return self._stored[id][0]

    def delete(self, id: str) -> bool:
        """Whether it was there."""
        if id not in self._stored:
            return False
        self._characters -= self._stored.pop(id)[1]
        return True
