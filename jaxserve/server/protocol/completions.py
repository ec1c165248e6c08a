"""`/v1/completions`: request and response."""

from typing import Any, Literal

from pydantic import model_validator

from jaxserve.server.protocol.base import PromptLogprobs, ResponseType, Usage, refusal
from jaxserve.server.protocol.prompts import Prompts
from jaxserve.server.protocol.structured import StructuredRequest


class CompletionRequest(StructuredRequest):
    unsupported = {
        "suffix": ("",),
        # vLLM's
        "bad_words": ([],),
        "guided_decoding_backend": ("auto", "guidance"),
        "length_penalty": (1.0,),
        "spaces_between_special_tokens": (True,),
        "structural_tag": (),
        "use_beam_search": (False,),
    }

    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None  # to prompts of text, such as a beginning of sequence; true unless told
    truncate_prompt_tokens: int | None = None  # keeps that many from the end; -1: what leaves room for max_tokens
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check_truncation(self) -> "CompletionRequest":
        tokens = self.truncate_prompt_tokens
        if tokens is not None and tokens != -1 and tokens < 1:
            raise refusal(
                "truncate_prompt_tokens", f"truncate_prompt_tokens is {tokens}; give -1 or an integer from 1 on"
            )
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refusal(
                "best_of", f"best_of is {self.best_of} and n is {self.n or 1}; best_of other than n is not supported"
            )
        return self

    def sampling_settings(self) -> dict[str, Any]:
        settings = super().sampling_settings()
        if self.echo and self.logprobs is not None:
            settings["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        if self.only_echoes:
            settings["max_tokens"] = 1  # which is left out of the answer
        return settings

    def other_names(self) -> dict[str, str]:
        return {"prompt_token_ids": "prompt"}

    @property
    def only_echoes(self) -> bool:
        """Whether the answer is the prompt alone, as whoever wants its log-probabilities asks."""
        return bool(self.echo) and self.max_tokens == 0


class CompletionLogprobs(ResponseType):
    """One entry of each list for each token. A prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseType):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(ResponseType):
    """A whole response, or one chunk of a stream: they look alike."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
