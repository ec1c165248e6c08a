"""How one model speaks: its conversations as prompts, and its text as answers."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.chat import harmony, styles
from jaxserve.chat.calls import Calls
from jaxserve.chat.events import Content
from jaxserve.chat.messages import for_template, tool_names
from jaxserve.chat.parser import AnswerParser
from jaxserve.chat.reasoning_tokens import BetweenTags, InChannel, ReasoningTokens
from jaxserve.chat.source import Parsing, Source
from jaxserve.chat.styles import GPT_OSS, GPT_OSS_TOOLS, REASONING, TOOLS
from jaxserve.chat.template import ChatTemplate, Renderer
from jaxserve.chat.thinking import opens_thinking, thinking
from jaxserve.errors import InputError, nearest

_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that turns reasoning off
_GPT_OSS_EFFORTS = ("low", "medium", "high")


class ChatFormat:
    """A model's chat template and its styles of reasoning and tool calls.

    Styles are told from the template and the tokenizer, or given by name. `chat_template` is a file whose template
    takes the place of the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        reasoning_parser: str = "auto",
        tool_call_parser: str = "auto",
    ):
        self._tokenizer = tokenizer
        self._added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._template = None
        if source := _read(chat_template) if chat_template else tokenizer.chat_template:
            self._template = ChatTemplate(source, tokenizer.special_tokens_map, Renderer())
        text = self._template.text if self._template else ""
        if reasoning_parser == "auto":
            reasoning_parser = styles.detect_reasoning(text, self._added) or "none"
        self._tools_unknown = False
        if tool_call_parser == "auto":
            detected = styles.detect_tools(text, self._added)
            tool_call_parser, self._tools_unknown = detected or "none", detected is None
        self.reasoning_parser, self.tool_call_parser = reasoning_parser, tool_call_parser
        if (reasoning_parser == GPT_OSS) != (tool_call_parser == GPT_OSS_TOOLS):
            raise InputError(
                f"reasoning_parser={reasoning_parser!r} does not go with tool_call_parser={tool_call_parser!r}; "
                f"{GPT_OSS!r} and {GPT_OSS_TOOLS!r} belong together"
            )
        self._tags = REASONING.get(reasoning_parser)
        self._tool_style = TOOLS.get(tool_call_parser)

    @property
    def template(self) -> str | None:
        """The text of its chat template, if it has one."""
        return self._template.text if self._template else None

    # Prompts

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        reasoning_effort: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; `variables` are the template's own. `InputError` says what cannot be."""
        if self._template is None:
            raise InputError("this model's tokenizer has no chat template; use generate with a plain prompt")
        if not messages:
            raise InputError("messages is empty; give at least one message")
        if continue_final_message and add_generation_prompt:
            raise InputError("continue_final_message and add_generation_prompt are both set; leave one of them out")
        given = {"tools": list(tools) if tools else None, "documents": list(documents) if documents else None}
        names = self._template.names(tools=bool(tools))
        for name, value in given.items():
            if value and name not in names:
                raise InputError(f"{name} is given, and this model's chat template knows none; leave it out")
        if tools:
            tool_names(tools)
            if self._tools_unknown:
                raise InputError(
                    "tools is given, and it is not known how this model calls them; start the engine with "
                    "tool_call_parser, where 'none' leaves calls in the text"
                )
        if unknown := sorted(variables.keys() - names):
            hint = nearest(unknown[0], names) or "; leave it out"
            raise InputError(
                f"chat_template_kwargs has {unknown[0]!r}, which this model's chat template does not read{hint}"
            )
        if reasoning_effort is not None:
            variables |= self._effort(reasoning_effort, names)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        return self._template.render(
            for_template(messages),
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **given,
            **variables,
        )

    def _effort(self, effort: str, names: frozenset[str]) -> dict[str, Any]:
        """The variables that tell the template how hard to think."""
        if "reasoning_effort" in names and (self.reasoning_parser != GPT_OSS or effort in _GPT_OSS_EFFORTS):
            return {"reasoning_effort": effort}
        if effort == "none":
            if switch := next((name for name in _SWITCHES if name in names), None):
                return {switch: False}
            if self.reasoning_parser == "none":
                return {}  # it does not think anyway
        allowed = "'none'" if any(name in names for name in _SWITCHES) else ""
        if self.reasoning_parser == GPT_OSS:
            allowed = f"one of {', '.join(map(repr, _GPT_OSS_EFFORTS))}"
        raise InputError(
            f"reasoning_effort is {effort!r}, which this model's chat template does not know; "
            + (f"give {allowed}, or leave it out" if allowed else "leave it out")
        )

    # Answers

    def needs_special_tokens(self, *, tools: bool) -> bool:
        """Whether the parser has to see special tokens in the text, because some of the style's marks are such."""
        if self.reasoning_parser == GPT_OSS:
            return True
        marks = (*(self._tags or ()), *(self._tool_style.markers if tools and self._tool_style else ()))
        return any(mark in self._special for mark in marks)

    def parser(
        self,
        prompt_token_ids: Sequence[int],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        parallel_tool_calls: bool = True,
        skip_special_tokens: bool = True,
    ) -> AnswerParser:
        """A parser of one answer to this prompt, whose text has its special tokens if `needs_special_tokens`.

        Without `tools` nothing is taken for a call. `skip_special_tokens` leaves the others out of what is read.
        """
        dropped = self._special if skip_special_tokens and self.needs_special_tokens(tools=bool(tools)) else ()
        names = tool_names(tools or ())
        max_calls = None if parallel_tool_calls else 1
        if self.reasoning_parser == GPT_OSS:
            calls = Calls(names, styles.make_call_id) if tools else None
            return AnswerParser(
                functools.partial(harmony.harmony, calls=calls),
                dropped=dropped,
                prompt=self._since(prompt_token_ids, {self._added.get(harmony.START)}),
                max_calls=max_calls,
                reasoning_tokens=self._tokens_in_channel(),
            )
        inside = False
        if self._tags:
            others = {id for token, id in self._added.items() if token not in self._tags}
            inside = opens_thinking(self._since(prompt_token_ids, others), self._tags)
        return AnswerParser(
            functools.partial(self._parse, names=names if tools else None, inside=inside),
            dropped=dropped,
            max_calls=max_calls,
            reasoning_tokens=self._tokens_between_tags(inside=inside),
        )

    def _parse(self, source: Source, *, names: frozenset[str] | None, inside: bool) -> Parsing[None]:
        if self._tags:
            yield from thinking(source, self._tags, inside=inside)
        if self._tool_style and names is not None:
            yield from self._tool_style.parse(source, Calls(names, self._tool_style.make_id))
        yield from source.until(Content)

    def _since(self, token_ids: Sequence[int], bounds: set[int | None]) -> str:
        """The text after the last token of `bounds`."""
        start = len(token_ids)
        while start and token_ids[start - 1] not in bounds:
            start -= 1
        return self._tokenizer.decode(token_ids[start:], skip_special_tokens=False)

    def _tokens_between_tags(self, *, inside: bool) -> ReasoningTokens | None:
        if not self._tags or not all(tag in self._added for tag in self._tags):
            return None
        return BetweenTags(self._added[self._tags.open], self._added[self._tags.close], inside=inside)

    def _tokens_in_channel(self) -> ReasoningTokens | None:
        if not all(marker in self._added for marker in harmony.MARKERS):
            return None
        channel, message = self._added[harmony.CHANNEL], self._added[harmony.MESSAGE]
        ends = frozenset(self._added[marker] for marker in harmony.ENDS)
        return InChannel(channel, message, ends, self._tokenizer.decode)


def _read(chat_template: str) -> str:
    try:
        return Path(chat_template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the chat_template {chat_template} ({error})") from error
