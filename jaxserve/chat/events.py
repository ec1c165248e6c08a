"""What an answer consists of, piece by piece, and whole."""

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """More of the answer itself."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool is called. `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON just as the model wrote it."""

    index: int
    text: str


Event = Reasoning | Content | CallBegin | CallArguments


def as_delta(events: Iterable[Event]) -> dict[str, Any]:
    """What events add to a message, in the shape of OpenAI's deltas."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}  # by index
    for event in events:
        match event:
            case Reasoning(text):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
            case Content(text):
                delta["content"] = delta.get("content", "") + text
            case CallBegin(index, id, name):
                calls[index] = {"index": index, "id": id, "type": "function", "function": {"name": name}}
            case CallArguments(index, text):
                function = calls.setdefault(index, {"index": index, "function": {}})["function"]
                function["arguments"] = function.get("arguments", "") + text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


@dataclasses.dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclasses.dataclass(slots=True)
class Answer:
    """What the events of an answer add up to."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> None:
        match event:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallBegin(_, id, name):
                self.tool_calls.append(ToolCall(id, name))
            case CallArguments(index, text):
                self.tool_calls[index].arguments += text

    def as_message(self) -> dict[str, Any]:
        """A message in OpenAI's shape, with the reasoning where there is any: a conversation goes on with it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["content"] = self.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message
