"""The items of a response, and the events that tell a client how they grow."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from jaxserve.chat.events import CallArguments, CallBegin, Content, Event, Reasoning
from jaxserve.server.protocol.responses import (
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseEvent,
)

MakeEvent = Callable[..., ResponseEvent]  # from a type and fields: it gives events their numbers


class ResponseOutput:
    """Grows with the events of an answer. The last item is the one that is open."""

    def __init__(self, event: MakeEvent):
        self.items: list[OutputItem] = []
        self._event = event
        self._open = False

    def add(self, event: Event) -> Iterator[ResponseEvent]:
        match event:
            case Reasoning(text):
                yield from self._grow(ReasoningItem, "rs", ReasoningText, text)
            case Content(text):
                yield from self._grow(MessageItem, "msg", OutputText, text)
            case CallBegin(_, id, name):
                yield from self.close()
                item = FunctionCallItem(id=_id("fc"), call_id=id, name=name, arguments="", status="in_progress")
                yield self._begin(item)
            case CallArguments(_, text):
                item = self._last(FunctionCallItem)
                item.arguments += text
                yield self._event("response.function_call_arguments.delta", delta=text, **self._place)

    def close(self, status: str = "completed") -> Iterator[ResponseEvent]:
        """The open item has come to its end."""
        if not self._open:
            return
        item = self.items[-1]
        if isinstance(item, FunctionCallItem):
            yield self._event(
                "response.function_call_arguments.done", arguments=item.arguments, name=item.name, **self._place
            )
        else:
            part = item.content[0]
            told = {"text": part.text, **self._place, "content_index": 0}
            if isinstance(part, ReasoningText):
                yield self._event("response.reasoning_text.done", **told)
            else:
                yield self._event("response.output_text.done", logprobs=[], **told)
            yield self._event("response.content_part.done", part=part.model_copy(), **self._place, content_index=0)
        item.status = status
        self._open = False
        yield self._event("response.output_item.done", item=_copy(item), output_index=len(self.items) - 1)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1].id, "output_index": len(self.items) - 1}

    def _begin(self, item: OutputItem) -> ResponseEvent:
        self.items.append(item)
        self._open = True
        return self._event("response.output_item.added", item=_copy(item), output_index=len(self.items) - 1)

    def _grow(
        self,
        kind: type[ReasoningItem] | type[MessageItem],
        prefix: str,
        part_kind: type[ReasoningText] | type[OutputText],
        text: str,
    ) -> Iterator[ResponseEvent]:
        if not self._open or not isinstance(self.items[-1], kind):
            yield from self.close()
            yield self._begin(kind(id=_id(prefix), content=[], status="in_progress"))
            part = part_kind(text="")
            yield self._event("response.content_part.added", part=part.model_copy(), **self._place, content_index=0)
            self._last(kind).content.append(part)  # type: ignore[arg-type]
        self._last(kind).content[0].text += text
        told = {"delta": text, **self._place, "content_index": 0}
        if part_kind is ReasoningText:
            yield self._event("response.reasoning_text.delta", **told)
        else:
            yield self._event("response.output_text.delta", logprobs=[], **told)

    def _last[T](self, kind: type[T]) -> T:
        item = self.items[-1]
        if not isinstance(item, kind):
            raise TypeError(f"the open item is a {type(item).__name__}")
        return item


def _copy(item: OutputItem) -> OutputItem:
    return item.model_copy(deep=True)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
