"""`/v1/responses`: request and response."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, model_validator

from jaxserve.chat.messages import parsed_arguments
from jaxserve.chat.tools import Choice, Tools
from jaxserve.errors import InputError
from jaxserve.server.protocol.base import (
    RequestType,
    ResponseType,
    SamplingFields,
    TemplateArguments,
    refusal,
    within,
)
from jaxserve.server.protocol.content import joined_text
from jaxserve.server.protocol.structured import TextFormat, structured_outputs
from jaxserve.structured_outputs import StructuredOutputsParams

_TEXT_PARTS = joined_text("input_text", "output_text", ignored=("annotations", "logprobs"))
_REASONING_PARTS = joined_text("reasoning_text")


class _Item(RequestType):
    """Items of an answer may come back as they were given; what they say of themselves is nothing to the model."""

    id: str | None = None
    status: str | None = None


class InputMessage(_Item):
    unsupported = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_TEXT_PARTS)]


class InputReasoning(_Item):
    unsupported = {"encrypted_content": ()}

    type: Literal["reasoning"]
    summary: list[Any] = Field(max_length=0)
    content: Annotated[str | None, BeforeValidator(_REASONING_PARTS)] = None


class InputCall(_Item):
    unsupported = {"namespace": (), "caller": ()}

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(_Item):
    unsupported = {"caller": ()}

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[str, BeforeValidator(_TEXT_PARTS)]


_ITEM_TYPES = ("message", "reasoning", "function_call", "function_call_output")


def _item_type(item: Any) -> str | None:
    return item.get("type", "message") if isinstance(item, dict) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputReasoning, Tag("reasoning")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(_item_type),
]


class FunctionTool(RequestType):
    unsupported = {"defer_loading": (False,), "allowed_callers": (), "output_schema": ()}

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedFunction(RequestType):
    type: Literal["function"]
    name: str

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class AllowedTools(RequestType):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]

    def for_chat(self) -> dict[str, Any]:
        allowed = {"mode": self.mode, "tools": [tool.for_chat() for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


class Reasoning(RequestType):
    unsupported = {"summary": ("auto",), "generate_summary": ("auto",), "context": ("auto",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextConfig(RequestType):
    unsupported = {"verbosity": ("medium",)}

    format: TextFormat | None = None


def _as_items(given: Any) -> Any:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    for number, item in enumerate(given if isinstance(given, list) else []):
        if _item_type(item) not in _ITEM_TYPES:
            allowed = ", ".join(map(repr, _ITEM_TYPES))
            raise ValueError(f"input[{number}] is of type {_item_type(item)!r}; give items of type {allowed}")
    return given


_CHOICES = (
    "'none', 'auto', 'required', {'type': 'function', 'name': ...} or "
    "{'type': 'allowed_tools', 'mode': ..., 'tools': [...]}"
)


def _checked_choice(choice: Any) -> Any:
    if choice in (None, "none", "auto", "required"):
        return choice
    if isinstance(choice, str):
        raise ValueError(f"tool_choice is {choice[:60]!r}; give {_CHOICES}")
    if not isinstance(choice, dict):
        raise ValueError(f"tool_choice is a {type(choice).__name__}; give a text or an object")
    return (AllowedTools if choice.get("type") == "allowed_tools" else NamedFunction).model_validate(choice)


class ResponsesRequest(SamplingFields):
    unsupported = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[list[InputItem], BeforeValidator(_as_items)] = []
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    # Reasoning comes as readable text, which can be sent back: nothing has to be encrypted for that.
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[str | NamedFunction | AllowedTools | None, BeforeValidator(_checked_choice)] = None
    chat_template_kwargs: TemplateArguments = None

    _wanted: StructuredOutputsParams | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _read_wanted(self) -> "ResponsesRequest":
        if self.text and self.text.format and (settings := self.text.format.settings()):
            self._wanted = structured_outputs("text.format", settings)
        return self

    @model_validator(mode="after")
    def _check_calls(self) -> "ResponsesRequest":
        for number, item in enumerate(self.input):
            if isinstance(item, InputCall):
                place = f"input[{number}].arguments"
                try:
                    parsed_arguments(item.arguments, place)
                except InputError as error:
                    raise refusal(place, str(error)) from error
        return self

    @property
    def chosen(self) -> Choice:
        """What `tool_choice` says, as chat has it."""
        choice = self.tool_choice
        return "auto" if choice is None else choice if isinstance(choice, str) else choice.for_chat()

    def called(self) -> Tools:
        """The tools that may be called; `InputError` if they are none."""
        tools = [tool.for_chat() for tool in self.tools or []]
        return Tools.of(tools, self.chosen, parallel=self.parallel_tool_calls is not False)

    def sampling_settings(self) -> dict[str, Any]:
        return super().sampling_settings() | {
            "max_tokens": self.max_output_tokens,
            "structured_outputs": self._wanted,
        }

    def other_names(self) -> dict[str, str]:
        names = within("chat_template_kwargs", (self.chat_template_kwargs or {}).keys() - type(self).model_fields)
        names |= {"prompt": "input", "messages": "input", "max_tokens": "max_output_tokens"}
        names["function.parameters"] = "parameters"
        if self.reasoning and self.reasoning.effort:
            names["reasoning_effort"] = "reasoning.effort"
        return names

    def template_arguments(self) -> dict[str, Any]:
        effort = self.reasoning.effort if self.reasoning else None
        return (self.chat_template_kwargs or {}) | ({} if effort is None else {"reasoning_effort": effort})


def as_messages(items: list[Any]) -> list[dict[str, Any]]:
    """Items as messages: what the assistant has thought, said and called in one go is one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case InputMessage(role=role) if role != "assistant":
                messages.append({"role": role, "content": item.content})
            case InputCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            case _:
                if not messages or messages[-1]["role"] != "assistant" or not _goes_on(messages[-1], item):
                    messages.append({"role": "assistant", "content": ""})
                _add(messages[-1], item)
    return messages


def _goes_on(message: dict[str, Any], item: InputMessage | InputReasoning | InputCall) -> bool:
    """Whether an item belongs to the assistant's last message: reasoning begins one, and content comes before calls."""
    if isinstance(item, InputCall):
        return True
    return message.keys() <= {"role", "content", "reasoning_content"} and not message["content"]


def _add(message: dict[str, Any], item: InputMessage | InputReasoning | InputCall) -> None:
    match item:
        case InputMessage():
            message["content"] = item.content
        case InputReasoning():
            message["reasoning_content"] = "\n".join(filter(None, (message.get("reasoning_content"), item.content)))
        case InputCall():
            function = {"name": item.name, "arguments": item.arguments}
            message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


class ReasoningText(ResponseType):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputText(ResponseType):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningItem(ResponseType):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[Any] = []
    content: list[ReasoningText]
    status: str


class MessageItem(ResponseType):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]
    status: str


class FunctionCallItem(ResponseType):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = ReasoningItem | MessageItem | FunctionCallItem


class InputDetails(ResponseType):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(ResponseType):
    reasoning_tokens: int


class ResponseUsage(ResponseType):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(ResponseType):
    reason: str


class ResponseError(ResponseType):
    code: str
    message: str


class ResponseObject(ResponseType):
    """The response; while it streams, as far as it has come."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None

    def to_json(self) -> str:
        return self.model_dump_json()


class ResponseEvent(ResponseType):
    """Any of a stream's events; each type has those of the fields that OpenAI gives it."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    item: OutputItem | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: ReasoningText | OutputText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None

    def to_json(self) -> str:
        given = self.model_fields_set
        return self.model_dump_json(include=given)


class DeletedResponse(ResponseType):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True

    def to_json(self) -> str:
        return self.model_dump_json()
