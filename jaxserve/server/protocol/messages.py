"""Anthropic's `/v1/messages`: request and response."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from jaxserve.chat.tools import Choice, Tools
from jaxserve.server.protocol.base import RequestType, ResponseType, TemplateArguments, refusal, within
from jaxserve.server.protocol.content import joined_text
from jaxserve.server.protocol.structured import OutputFormat, structured_outputs
from jaxserve.structured_outputs import StructuredOutputsParams

# The prefix cache keeps every prompt, so that marks for what to keep ask for nothing.
_text = joined_text("text", ignored=("cache_control", "citations"))


class _Block(RequestType):
    cache_control: dict[str, Any] | None = None


class TextBlock(_Block):
    unsupported = {"citations": ([],)}

    type: Literal["text"]
    text: str


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # made by whoever wrote it; there is nothing to check


class ToolUseBlock(_Block):
    unsupported = {"caller": ({"type": "direct"},)}

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str | None, BeforeValidator(_text)] = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
_BLOCKS = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


class InputMessage(RequestType):
    role: Literal["user", "assistant"]
    content: list[Block]

    @model_validator(mode="before")
    @classmethod
    def _list_blocks(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("content"), str):
            given = given | {"content": [{"type": "text", "text": given["content"]}]}
        role = given.get("role")
        known = _BLOCKS.get(role, ()) if isinstance(role, str) else ()
        for block in given["content"] if known and isinstance(given.get("content"), list) else []:
            if isinstance(block, dict) and block.get("type") not in known:
                raise refusal(
                    "content",
                    f"content has a block of type {block.get('type')!r}; the {given['role']}'s are of type "
                    + " or ".join(map(repr, known)),
                )
        return given

    def as_messages(self) -> list[dict[str, Any]]:
        """As chat knows them: results of tools are messages of their own, and come before the user's text."""
        texts = [block.text for block in self.content if isinstance(block, TextBlock)]
        message: dict[str, Any] = {"role": self.role, "content": "\n".join(texts)}
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        calls = [block for block in self.content if isinstance(block, ToolUseBlock)]
        results = [block for block in self.content if isinstance(block, ToolResultBlock)]
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.input}}
                for call in calls
            ]
        return [
            *({"role": "tool", "tool_call_id": result.tool_use_id, "content": _said(result)} for result in results),
            *([message] if texts or not results else []),
        ]


def _said(result: ToolResultBlock) -> str:
    return f"Error: {result.content or ''}" if result.is_error else result.content or ""


class Tool(RequestType):
    unsupported = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (False, True),  # arguments come as the model writes them anyway
        "input_examples": ([],),
    }

    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None

    def for_chat(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


class ToolChoice(RequestType):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> Choice:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(RequestType):
    unsupported = {"display": ("summarized",)}

    type: Literal["adaptive", "enabled", "disabled"]
    budget_tokens: int | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> "Thinking":
        if self.budget_tokens is not None and (self.type != "enabled" or self.budget_tokens < 0):
            raise refusal(
                "budget_tokens",
                f"budget_tokens is {self.budget_tokens} with type {self.type!r}; "
                "give an integer from 0 on, with type 'enabled'",
            )
        return self


class OutputConfig(RequestType):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(RequestType):
    user_id: str | None = None


class CountTokensRequest(RequestType):
    """What makes the prompt."""

    unsupported = {
        "cache_control": ({"type": "ephemeral"},),
        "context_management": (),
        "mcp_servers": ([],),
    }

    model: str
    messages: list[InputMessage]
    system: Annotated[str | None, BeforeValidator(_text)] = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: TemplateArguments = None

    @model_validator(mode="after")
    def _check(self) -> "CountTokensRequest":
        if not self.messages:
            raise refusal("messages", "messages is empty; give at least one message")
        last = self.messages[-1]
        if last.role == "assistant" and any(isinstance(block, ToolUseBlock) for block in last.content):
            raise refusal(
                "messages", "messages ends with a tool_use, which no answer goes on from; give its result too"
            )
        names = [tool.name for tool in self.tools or []]
        if self.tool_choice and self.tool_choice.type == "tool" and self.tool_choice.name not in names:
            raise refusal("tool_choice", f"tool_choice names {self.tool_choice.name!r}, which is not among the tools")
        return self

    def called(self) -> Tools:
        """The tools that may be called; `InputError` if they are none."""
        return Tools.of(
            [tool.for_chat() for tool in self.tools or []],
            self.tool_choice.for_chat() if self.tool_choice else None,
            parallel=not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
        )

    @property
    def conversation(self) -> list[dict[str, Any]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [message for given in self.messages for message in given.as_messages()]

    def other_names(self) -> dict[str, str]:
        names = {"prompt": "messages", "stop": "stop_sequences", "thinking_token_budget": "thinking.budget_tokens"}
        names |= {"function.parameters": "input_schema", "continue_final_message": "messages"}
        names |= within("chat_template_kwargs", (self.chat_template_kwargs or {}).keys() - type(self).model_fields)
        if self.thinking and self.thinking.type == "disabled":
            names["reasoning_effort"] = "the effort of thinking.type 'disabled'"
        elif self.output_config and self.output_config.effort:
            names["reasoning_effort"] = "output_config.effort"
        return names

    def template_arguments(self) -> dict[str, Any]:
        """An assistant's message at the end is the beginning of the answer."""
        arguments = self.chat_template_kwargs or {}
        if self.messages and self.messages[-1].role == "assistant":
            arguments = arguments | {"continue_final_message": True}
        if self.thinking and self.thinking.type == "disabled":
            return arguments | {"reasoning_effort": "none"}
        effort = self.output_config.effort if self.output_config else None
        return arguments if effort is None else arguments | {"reasoning_effort": effort}


class MessagesRequest(CountTokensRequest):
    unsupported = CountTokensRequest.unsupported | {
        "container": (),
        "diagnostics": (),
        "inference_geo": (),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
    }

    max_tokens: int
    metadata: Metadata | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    _wanted: StructuredOutputsParams | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _read_wanted(self) -> "MessagesRequest":
        if self.output_config and self.output_config.format:
            self._wanted = structured_outputs("output_config.format", {"json": self.output_config.format.of_json})
        return self

    def sampling_settings(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "max_tokens")}
        given["thinking_token_budget"] = self.thinking.budget_tokens if self.thinking else None
        given["structured_outputs"] = self._wanted
        return {name: value for name, value in given.items() if value is not None} | {"stop": self.stop_sequences or ()}


class ThinkingAnswer(ResponseType):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class TextAnswer(ResponseType):
    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ToolUse(ResponseType):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = ThinkingAnswer | TextAnswer | ToolUse


def parsed_input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; what is no JSON object is shown as it is in one."""
    try:
        value = json.loads(arguments)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"invalid_json": arguments}


class MessageUsage(ResponseType):
    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


class AnswerMessage(ResponseType):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage

    def to_json(self) -> str:
        return self.model_dump_json()


class BlockDelta(ResponseType):
    type: Literal["thinking_delta", "text_delta", "input_json_delta"]
    thinking: str | None = None
    text: str | None = None
    partial_json: str | None = None


class MessageDelta(ResponseType):
    stop_reason: str | None
    stop_sequence: str | None


class MessageEvent(ResponseType):
    """Any of a stream's events; each type has those of the fields that Anthropic gives it."""

    type: str
    message: AnswerMessage | None = None
    index: int | None = None
    content_block: AnswerBlock | None = None
    delta: BlockDelta | MessageDelta | None = None
    usage: MessageUsage | None = None
    error: "MessageErrorDetail | None" = None

    def to_json(self) -> str:
        dumped = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        for name, value in dumped.items():
            if isinstance(value, ResponseType):
                dumped[name] = value.model_dump(exclude_unset=isinstance(value, BlockDelta))
        return json.dumps(dumped, ensure_ascii=False)


class MessageErrorDetail(ResponseType):
    type: str
    message: str


class MessageError(ResponseType):
    type: Literal["error"] = "error"
    error: MessageErrorDetail

    def to_json(self) -> str:
        return self.model_dump_json()


class TokenCount(ResponseType):
    input_tokens: int
