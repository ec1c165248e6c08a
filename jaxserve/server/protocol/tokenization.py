"""`/tokenize`, `/detokenize` and `/tokenizer_info`: requests and responses, in vLLM's shapes."""

from typing import Any

from pydantic import model_validator

from jaxserve.server.protocol.base import RequestType, ResponseType, TemplateArguments, refusal
from jaxserve.server.protocol.chat import ChatCompletionRequest, Message

_OF_CHAT = (
    *("tools", "tool_choice", "reasoning_effort", "documents"),
    *("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
)


class TokenizeRequest(RequestType):
    """A text, or a conversation as `/v1/chat/completions` renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    # Such as a beginning of sequence. Unless told, a text gets it, and a conversation has what its template writes.
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments = None

    @model_validator(mode="after")
    def _check_form(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "prompt and messages are both given or both missing; give one of them")
        given = next((name for name in _OF_CHAT if getattr(self, name) is not None), None)
        if self.messages is None and given:
            raise refusal(given, f"{given} goes with messages; leave it out")
        return self

    def other_names(self) -> dict[str, str]:
        return {} if self.messages is None else {"prompt": "messages"}

    def conversation(self) -> ChatCompletionRequest:
        """The request for an answer to `messages`; `ValidationError` if that would be refused."""
        names = ("messages", "add_special_tokens", *_OF_CHAT)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return ChatCompletionRequest(**given)


class TokenizeResponse(ResponseType):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestType):
    model: str | None = None
    tokens: list[int]


class DetokenizeResponse(ResponseType):
    prompt: str


class TokenizerInfo(ResponseType):
    tokenizer_class: str
    vocab_size: int  # added tokens included
    max_model_len: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
