"""`/v1/chat/completions`: request and response."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Json, model_validator

from jaxserve.server.protocol.base import (
    GenerationRequest,
    PromptLogprobs,
    RequestType,
    ResponseType,
    Usage,
    refusal,
)


def _joined(content: Any) -> Any:
    """Text parts as one string; what is no list of parts is left to the field's type."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("content has a part without a type; give parts {'type': 'text', 'text': ...}")
        if part["type"] != "text":
            raise ValueError(f"content parts of type {part['type']!r} are not supported; give parts of type 'text'")
        if unknown := part.keys() - {"type", "text"}:
            raise ValueError(f"content has a part with the field {min(unknown)!r}, which is unknown; leave it out")
        if not isinstance(part.get("text"), str):
            raise ValueError("content has a part of type 'text' without a string 'text'; give one")
        texts.append(part["text"])
    return "\n".join(texts)


class FunctionCall(RequestType):
    name: str
    # OpenAI has them as a string; templates write them in their model's own format, and so want them parsed.
    arguments: Annotated[Json[dict[str, Any]], BeforeValidator(lambda text: text or "{}")]


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
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise refusal("tool_calls", f"tool_calls does not go with role {self.role!r}; it is of role 'assistant'")
        if self.tool_call_id is not None and self.role != "tool":
            raise refusal("tool_call_id", f"tool_call_id does not go with role {self.role!r}; it is of role 'tool'")
        if self.content is None and not self.tool_calls:
            raise refusal("content", "content is missing; give a string or a list of text parts")
        return self

    def for_template(self) -> dict[str, Any]:
        """As templates know messages. The developer is OpenAI's newer name of the system, which none of them knows."""
        message = self.model_dump(exclude_none=True) | {"content": self.content or ""}
        return message | {"role": "system"} if self.role == "developer" else message


class ChatCompletionRequest(GenerationRequest):
    unsupported = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True,),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("auto",),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refusal(
                "max_completion_tokens", "max_tokens and max_completion_tokens are both given; give one of them"
            )
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise refusal("top_logprobs", f"top_logprobs is {self.top_logprobs}; give an integer from 0 on")
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs needs logprobs=true; set it or leave top_logprobs out")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> "ChatCompletionRequest":
        for tool in self.tools or []:
            if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
                raise refusal("tools", f"tools has one of type {tool.get('type')!r}; only functions are supported")
            if tool["function"].get("strict"):
                raise refusal("tools", "tools has a function with strict=true, which is not supported; leave it out")
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in (self.chat_template_kwargs or {}):
                raise refusal("chat_template_kwargs", f"chat_template_kwargs has {name!r}; give that beside it instead")
        return self

    def sampling_settings(self) -> dict[str, Any]:
        settings = super().sampling_settings()
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return settings | {"max_tokens": limit, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def template_arguments(self) -> dict[str, Any]:
        return {
            "tools": self.tools or None,
            "add_generation_prompt": self.add_generation_prompt,
            **(self.chat_template_kwargs or {}),
        }


class TopLogprob(ResponseType):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseType):
    content: list[TokenLogprob]


class AnswerMessage(ResponseType):
    role: Literal["assistant"]
    content: str


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
