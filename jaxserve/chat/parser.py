"""One answer while it comes: text and tokens in, events out."""

from collections.abc import Callable, Sequence

from jaxserve.chat.events import Answer, CallArguments, CallBegin, Event
from jaxserve.chat.reasoning_tokens import ReasoningTokens
from jaxserve.chat.source import Parsing, Source
from jaxserve.outputs import CompletionOutput


class AnswerParser:
    """Tells reasoning, content and tool calls apart. A whole answer is one that comes in a single piece.

    `parse` reads the text; with `max_calls`, later tool calls are left out.
    """

    def __init__(
        self,
        parse: Callable[[Source], Parsing[None]],
        *,
        dropped: tuple[str, ...] = (),
        prompt: str = "",
        max_calls: int | None = None,
        reasoning_tokens: ReasoningTokens | None = None,
    ):
        self._source = Source(dropped)
        self._parsing = parse(self._source)
        self._max_calls = max_calls
        self._reasoning_tokens = reasoning_tokens
        self._source.add(prompt)  # what the answer goes on with, which is none of it
        self._read()

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Event]:
        """What is certain after this text. `token_ids` are counted only, so that the text may be behind them."""
        if self._reasoning_tokens:
            self._reasoning_tokens.push(token_ids)
        self._source.add(text)
        return self._read()

    def read(self, delta: CompletionOutput) -> list[Event]:
        """The events of what a step added to the completion that is this answer, or of all of it."""
        events = self.push(delta.text, delta.token_ids)
        return events + self.finish() if delta.finished() else events

    def finish(self) -> list[Event]:
        """What was held back, once no more text comes."""
        self._source.end()
        return self._read()

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far, its tags among them."""
        return self._reasoning_tokens.count if self._reasoning_tokens else 0

    def _read(self) -> list[Event]:
        events: list[Event] = []
        for event in self._parsing:
            if event is None:
                break
            left_out = isinstance(event, CallBegin | CallArguments) and event.index >= (self._max_calls or float("inf"))
            if not left_out:
                events.append(event)
        return events


def whole_answer(parser: AnswerParser, completion: CompletionOutput) -> Answer:
    """The answer that a completion is which has ended."""
    answer = Answer()
    for event in parser.read(completion):
        answer.add(event)
    return answer
