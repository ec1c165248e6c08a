"""`/v1/chat/completions`: request and response."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from jaxserve.chat.template import checked_arguments
from jaxserve.chat.tools import Tools
from jaxserve.server.protocol.base import (
    ObjectOrText,
    PromptLogprobs,
    RequestType,
    ResponseType,
    Usage,
    refusal,
)
from jaxserve.server.protocol.content import joined_text
from jaxserve.server.protocol.structured import StructuredRequest


class FunctionCall(RequestType):
    name: str
    arguments: str


class ToolCall(RequestType):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestType):
    unsupported = {
        "refusal": (),
        "audio": (),
        "function_call": (),
        "annotations": ([],),
    }  # of an answer that is sent back

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(joined_text("text"))] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of the same
    # What LiteLLM notes on an answer, and sends back with it; the model is told nothing of it.
    provider_specific_fields: Annotated[dict[str, Any] | None, Field(exclude=True)] = None

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise refusal("tool_calls", f"tool_calls does not go with role {self.role!r}; it is of role 'assistant'")
        if self.tool_call_id is not None and self.role != "tool":
            raise refusal("tool_call_id", f"tool_call_id does not go with role {self.role!r}; it is of role 'tool'")
        for name in ("reasoning_content", "reasoning"):
            if getattr(self, name) is not None and self.role != "assistant":
                raise refusal(name, f"{name} does not go with role {self.role!r}; it is of role 'assistant'")
        if self.content is None and not (self.tool_calls or self.reasoning_content or self.reasoning):
            raise refusal("content", "content is missing; give a string or a list of text parts")
        return self


# Arguments of the template that are fields of their own.
_BESIDE = ("documents", "add_generation_prompt", "continue_final_message", "add_special_tokens", "reasoning_effort")
_Arguments = Annotated[
    dict[str, Any] | None, AfterValidator(lambda given: checked_arguments(given, ("messages", "tools", *_BESIDE)))
]


class ChatCompletionRequest(StructuredRequest):
    unsupported = {
        "audio": (),
        "chat_template": (),  # a program from anyone; the engine's setting of that name gives another
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
        # vLLM's
        "guided_decoding_backend": ("auto", "guidance"),
        "structural_tag": (),
    }

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ObjectOrText = None  # in the forms that `Tools` reads
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: int | None = None
    include_reasoning: bool | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool | None = None  # begin with the last message, if that is the assistant's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: _Arguments = None

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refusal(
                "max_completion_tokens", "max_tokens and max_completion_tokens are both given; give one of them"
            )
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs needs logprobs=true; set it or leave top_logprobs out")
        return self

    def sampling_settings(self) -> dict[str, Any]:
        settings = super().sampling_settings()
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return settings | {"max_tokens": limit, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def other_names(self) -> dict[str, str]:
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        return names if self.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}

    def template_arguments(self) -> dict[str, Any]:
        """What the template is rendered with, beside messages and tools."""
        given = {name: value for name in _BESIDE if (value := getattr(self, name)) is not None}
        return given | (self.chat_template_kwargs or {})

    def called(self) -> Tools:
        """The tools that may be called; `InputError` if they are none."""
        return Tools.of(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)

    @property
    def echoed(self) -> str:
        """What the answer begins with."""
        last = self.messages[-1] if self.messages else None
        return (last.content or "") if self.echo and last and last.role == "assistant" else ""


class TopLogprob(ResponseType):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseType):
    content: list[TokenLogprob]


class CalledFunction(ResponseType):
    name: str | None = None
    arguments: str | None = None


class AnswerToolCall(ResponseType):
    index: int | None = None  # in deltas
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class AnswerMessage(ResponseType):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(ResponseType):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(ResponseType):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class Delta(ResponseType):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChunkChoice(ResponseType):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatChunk(ResponseType):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
