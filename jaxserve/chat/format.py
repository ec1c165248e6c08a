"""How one model speaks: its conversations as prompts, and its text as answers."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve import lark
from jaxserve.chat import harmony, styles, tool_grammars
from jaxserve.chat.calls import Calls
from jaxserve.chat.events import Content
from jaxserve.chat.messages import for_template
from jaxserve.chat.parser import AnswerParser
from jaxserve.chat.reasoning_tokens import BetweenTags, InChannel, ReasoningTokens
from jaxserve.chat.source import Parsing, Source
from jaxserve.chat.styles import GPT_OSS, GPT_OSS_TOOLS, REASONING, TOOLS
from jaxserve.chat.template import ChatTemplate, Renderer
from jaxserve.chat.thinking import closes_thinking, opens_thinking, thinking
from jaxserve.chat.tools import Tools
from jaxserve.errors import InputError, Name, nearest
from jaxserve.sampling_params import ChatGrammar, SamplingParams, Thinking

_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that turns reasoning off
_GPT_OSS_EFFORTS = ("low", "medium", "high")
_NO_TOOLS = Tools()


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
        self._not_text = lark.special_tokens(tokenizer)
        self._template = None
        if source := _read(chat_template) if chat_template else tokenizer.chat_template:
            file = chat_template or _template_file(tokenizer)
            self._template = ChatTemplate(source, tokenizer.special_tokens_map, Renderer(), file)
            if chat_template:
                self._template.names()  # refuses it now; with a damaged one of the model's, plain prompts may do
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
        self._in_channels = reasoning_parser == GPT_OSS
        self._tags = REASONING.get(reasoning_parser)
        self._tool_style = TOOLS.get(tool_call_parser)

    @property
    def template(self) -> str | None:
        """The text of its chat template, if it has one."""
        return self._template.text if self._template else None

    # Prompts

    def render(
        self,
        /,
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
        if not isinstance(messages, Sequence):
            raise InputError(Name("messages"), f" is of type {type(messages).__name__}; give a list of messages")
        if not messages:
            raise InputError(Name("messages"), " is empty; give at least one message")
        if continue_final_message and add_generation_prompt:
            raise InputError(
                Name("continue_final_message"),
                " and ",
                Name("add_generation_prompt"),
                " are both set; leave one of them out",
            )
        given = {"tools": list(tools) if tools else None, "documents": list(documents) if documents else None}
        names = self._template.names(tools=bool(tools))
        for name, value in given.items():
            if value and name not in names:
                raise InputError(Name(name), " is given, and this model's chat template knows none; leave it out")
        if tools:
            Tools.of(tools)
            if self._tools_unknown:
                raise InputError(
                    Name("tools"),
                    " is given, and it is not known how this model calls them; start the engine with "
                    "tool_call_parser, where 'none' leaves calls in the text",
                )
        if unknown := sorted(variables.keys() - names):
            hint = nearest(unknown[0], names) or "; leave it out"
            raise InputError(
                Name("chat_template_kwargs"),
                f" has {unknown[0]!r}, which this model's chat template does not read{hint}",
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
            Name("reasoning_effort"),
            f" is {effort!r}, which this model's chat template does not know; ",
            f"give {allowed}, or leave it out" if allowed else "leave it out",
        )

    # Answers

    def needs_special_tokens(self, *, tools: bool) -> bool:
        """Whether the parser has to see special tokens in the text, because some of the style's marks are such."""
        if self._in_channels:
            return True
        marks = (*(self._tags or ()), *(self._tool_style.markers if tools and self._tool_style else ()))
        return any(mark in self._special for mark in marks)

    def settings(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], tools: Tools = _NO_TOOLS
    ) -> SamplingParams:
        """What the engine is given for an answer to this prompt, with `params` for the rest.

        With that the text has what the parser has to see, tools are called as is asked for, structured outputs bind
        behind the thinking, and that keeps to its budget. `InputError` for what this model cannot keep to.
        """
        turn = self._last_turn(prompt_token_ids)
        grammar = self._grammar(params, turn, tools)
        thinking = None
        if grammar or params.structured_outputs or params.thinking_token_budget is not None:
            in_grammar = self._in_channels and grammar is not None
            thinking = self._thinking(turn, params.thinking_token_budget, in_grammar=in_grammar)
        return dataclasses.replace(
            params,
            skip_special_tokens=params.skip_special_tokens and not self.needs_special_tokens(tools=bool(tools.shown)),
            thinking=thinking,
            thinking_token_budget=None if thinking is None else thinking.budget,
            chat_grammar=grammar,
        )

    def parser(
        self, prompt_token_ids: Sequence[int], *, tools: Tools = _NO_TOOLS, skip_special_tokens: bool = True
    ) -> AnswerParser:
        """A parser of one answer to this prompt, whose text has its special tokens if `needs_special_tokens`.

        Without `tools` nothing is taken for a call. `skip_special_tokens` leaves the others out of what is read.
        """
        shown = bool(tools.shown)
        dropped = self._special if skip_special_tokens and self.needs_special_tokens(tools=shown) else ()
        names = frozenset(function.name for function in tools.callable)
        max_calls = None if tools.parallel else 1
        turn = self._last_turn(prompt_token_ids)
        if self._in_channels:
            calls = Calls(names, styles.make_call_id) if shown else None
            return AnswerParser(
                functools.partial(harmony.harmony, calls=calls),
                dropped=dropped,
                prompt=turn,
                max_calls=max_calls,
                reasoning_tokens=self._tokens_in_channel(),
            )
        inside = self._tags is not None and opens_thinking(turn, self._tags)
        return AnswerParser(
            functools.partial(self._parse, names=names if shown else None, inside=inside),
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

    def _last_turn(self, token_ids: Sequence[int]) -> str:
        """The end of a prompt in which its answer has begun: what stands after the last mark of another kind."""
        if self._in_channels:
            bounds = {self._added.get(harmony.START)}
        else:
            bounds = {id for token, id in self._added.items() if token not in (self._tags or ())}
        start = len(token_ids)
        while start and token_ids[start - 1] not in bounds:
            start -= 1
        return self._tokenizer.decode(token_ids[start:], skip_special_tokens=False)

    def _grammar(self, params: SamplingParams, turn: str, tools: Tools) -> ChatGrammar | None:
        """What the answer is made of, where that is more than structured outputs say and less than anything."""
        wanted = params.structured_outputs
        marks = tool_grammars.Marks(self._not_text, self.template or "")
        if self._in_channels and (wanted or tools.restrained):
            if harmony.MESSAGE not in turn:
                return tool_grammars.of_channels(tools, wanted, marks)
            if tools.required:
                raise InputError(Name("tool_choice"), " asks for a call in an answer that has begun; leave it out")
        elif tools.restrained or (wanted and tools.shown):
            if self._tool_style is None:
                raise InputError(
                    Name("tool_choice" if tools.required else "tools"),
                    " asks for calls of a certain form, and this engine was started with "
                    f"tool_call_parser={self.tool_call_parser!r}; leave it out",
                )
            return tool_grammars.of_calls(self._tool_style.grammar, tools, wanted, marks)
        return None

    def _thinking(self, turn: str, budget: int | None, *, in_grammar: bool) -> Thinking | None:
        """How an answer thinks; None if it does not, as where the prompt has done with it."""
        if self._in_channels:
            if harmony.MESSAGE in turn:
                return None
            channel, message, end = (self._token(mark) for mark in (harmony.CHANNEL, harmony.MESSAGE, harmony.END))
            start = (channel, *self._tokenizer.encode("analysis", add_special_tokens=False), message)
            return Thinking(start=start, end=(end,), budget=budget, closing=(end,), in_grammar=in_grammar)
        if self._tags is None:
            if budget is not None:
                raise InputError(
                    Name("thinking_token_budget"),
                    " is given, and it is not known how this model thinks; leave it out, or start the engine with "
                    "reasoning_parser",
                )
            return None
        if closes_thinking(turn, self._tags):
            return None
        end = self._token(self._tags.close)
        start = () if opens_thinking(turn, self._tags) else (self._token(self._tags.open),)
        breaks = self._line_breaks
        closing = (*breaks[:1], end)
        return Thinking(start=start, end=(end,), budget=budget, closing=closing, blank=breaks)

    def _token(self, mark: str) -> int:
        if mark not in self._added:
            raise InputError(
                f"this model's tokenizer has no token for {mark!r}, so that nothing can be bound to where its thinking "
                "begins or ends; leave structured outputs, ",
                Name("tool_choice"),
                " and ",
                Name("thinking_token_budget"),
                " out",
            )
        return self._added[mark]

    @functools.cached_property
    def _line_breaks(self) -> tuple[int, ...]:
        """The tokens that are one line break, or two, the shortest first."""
        found = dict.fromkeys(
            token for text in ("\n", "\n\n") for token in self._tokenizer.encode(text, add_special_tokens=False)
        )
        return tuple(token for token in found if set(self._tokenizer.decode([token])) == {"\n"})

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


def _template_file(tokenizer: Any) -> str:
    """Where `transformers` has found the tokenizer's own template."""
    file = Path(tokenizer.name_or_path) / "chat_template.jinja"
    return str(file if file.exists() else file.with_name("tokenizer_config.json"))


def _read(chat_template: str) -> str:
    try:
        return Path(chat_template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the chat_template {chat_template} ({error})") from error
