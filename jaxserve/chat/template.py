"""Chat templates, rendered with a bound on time, memory and length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.errors import InputError, Name
from jaxserve.limited_process import LimitedProcess

MAX_SECONDS = 3.0  # of CPU time
MAX_BYTES = 2**30  # of memory
MAX_CHARACTERS = 2**24  # of the text; more than any model's context

_END_OF_PART = "\U000f0002"  # in the place where a message is to be continued; private, so that no text has it


def checked_arguments(given: Any, beside: Sequence[str] = ("messages", "tools")) -> dict[str, Any] | None:
    """A template's arguments as they are given; `InputError` if any of what is given `beside` them is among them."""
    field = Name("chat_template_kwargs")
    if not isinstance(given, dict | None):
        raise InputError(field, f" is of type {type(given).__name__}; give a dict")
    for name in beside:
        if name in (given or {}):
            raise InputError(field, f" has {name!r}; give that beside it instead")
    return given


class Renderer(LimitedProcess):
    """The process of `render_process.py`."""

    def __init__(self, *, seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES, characters: int = MAX_CHARACTERS):
        program = Path(__file__).with_name("render_process.py")
        super().__init__(program, str(max_bytes), str(characters), seconds=seconds)


class ChatTemplate:
    """A checkpoint's template, or several by name, with the special tokens that templates know as variables.

    `place` is what errors call it: the file that it stands in.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, Any],
        renderer: Renderer,
        place: str = "the chat template",
    ):
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens)
        self._renderer, self._place = renderer, place
        self._names: dict[str, frozenset[str]] = {}

    @property
    def text(self) -> str:
        """All that the template says, to be searched."""
        return "\n".join(self._sources.values())

    def names(self, *, tools: bool = False) -> frozenset[str]:
        """The variables that the template reads."""
        source = self._source(tools=tools)
        if source not in self._names:
            self._names[source] = frozenset(self._ask({"template": source})["names"])
        return self._names[source]

    def render(
        self, /, messages: Sequence[dict[str, Any]], *, continue_final_message: bool = False, **variables: Any
    ) -> str:
        """The prompt. With `continue_final_message` it ends where the last message's content ends."""
        messages = list(messages)
        if continue_final_message:
            last = messages[-1]
            if not isinstance(last.get("content"), str) or last.get("tool_calls"):
                raise InputError(
                    Name("continue_final_message"),
                    " needs a last message that is content alone; give its beginning as a string",
                )
            messages[-1] = last | {"content": last["content"] + _END_OF_PART}
        text = self._ask(
            {
                "template": self._source(tools=bool(variables.get("tools"))),
                "variables": self._special_tokens | variables | {"messages": messages},
            }
        )["text"]
        if not continue_final_message:
            return text
        before, mark, _ = text.rpartition(_END_OF_PART)
        if not mark:
            raise InputError(
                "the chat template leaves the last message out, so that it cannot be continued; end with another",
                field="continue_final_message",
            )
        return before

    def _source(self, *, tools: bool) -> str:
        if tools and "tool_use" in self._sources:
            return self._sources["tool_use"]
        return self._sources.get("default") or next(iter(self._sources.values()))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._renderer.ask(question)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the conversation holds what JSON cannot express ({error}); give plain values", field="messages"
            ) from error
        if answer.get("syntax"):
            raise InputError(f"{self._place} is no chat template that can be read ({answer['error']}); mend it")
        if "error" in answer:
            raise InputError(
                f"the chat template cannot render these messages ({answer['error']}); check their roles and contents",
                field="messages",
            )
        return answer
