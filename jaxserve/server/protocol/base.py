"""What the types of all endpoints share."""

import dataclasses
import enum
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from jaxserve.chat.template import checked_arguments
from jaxserve.sampling_params import SamplingParams


class RequestType(BaseModel):
    """A part of a request. A field that it does not declare is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # Fields of OpenAI's that are not supported, each with the values that ask for nothing. Null is always one of them.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in cls.unsupported.items():
            if given.get(name) is not None and given[name] not in neutral:
                other = next((f" other than {value!r}" for value in neutral if value), "")
                raise refusal(name, f"{name}{other} is not supported; leave it out")
        return {name: value for name, value in given.items() if name not in cls.unsupported}

    def other_names(self) -> dict[str, str]:
        """What an `InputError` calls otherwise than this request does, each with the request's name for it."""
        return {}


def refusal(field: str, sentence: str) -> PydanticCustomError:
    """An error about one field of the type that is being validated."""
    return PydanticCustomError("refusal", "{sentence}", {"field": field, "sentence": sentence})


def within(field: str, names: Iterable[str]) -> dict[str, str]:
    """What stands in a field, each with its path."""
    return {name: f"{field}.{name}" for name in names}


def _checked_kind(value: Any, field: ValidationInfo) -> Any:
    if not isinstance(value, str | dict | None):
        raise ValueError(f"{field.field_name} is a {type(value).__name__}; give an object or a text")
    return value


ObjectOrText = Annotated[dict[str, Any] | str | None, BeforeValidator(_checked_kind)]


TemplateArguments = Annotated[dict[str, Any] | None, AfterValidator(checked_arguments)]


def _token_ids_as_keys(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise ValueError("logit_bias has a key that is no token id; give a dict of token ids to numbers") from error


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class UsageWanted(enum.IntEnum):
    """Where a stream tells its usage."""

    NOWHERE = 0
    LAST = 1  # in a last chunk of its own
    EVERYWHERE = 2  # there, and in each chunk how much it is so far


class StreamOptions(RequestType):
    unsupported = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    @model_validator(mode="after")
    def _check_usage(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise refusal(
                "continuous_usage_stats", "continuous_usage_stats needs include_usage=true; set it or leave it out"
            )
        return self


Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # which messages to the engine's process have room for


class SamplingFields(RequestType):
    """The fields of every API of OpenAI's that generates. None leaves it to the model's recommendation or a default."""

    model: str | None = None
    user: str | None = None  # goes to the debug log
    priority: Priority = 0
    stream: bool | None = None

    # Named as in SamplingParams, which checks their values.
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_token_ids_as_keys)] = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_listed, json_schema_input_type=str | list[str] | None)] = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    def sampling_settings(self) -> dict[str, Any]:
        """What the request says about sampling, in `SamplingParams`' names."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


class GenerationRequest(SamplingFields):
    """What both kinds of completions have beside."""

    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # the response's id ends with it
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    n: int | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options needs stream=true; set it or leave stream_options out")
        if self.prompt_logprobs is not None and self.stream:
            raise refusal("prompt_logprobs", "prompt_logprobs does not go with stream=true; leave one of them out")
        return self

    @property
    def include_usage(self) -> UsageWanted:
        options = self.stream_options
        if not options or not options.include_usage:
            return UsageWanted.NOWHERE
        return UsageWanted.EVERYWHERE if options.continuous_usage_stats else UsageWanted.LAST


class ResponseType(BaseModel):
    """A part of a response. What its constructor is not given does not appear in the JSON."""

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class Usage(ResponseType):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptLogprob(ResponseType):
    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]  # by position, then by token id; vLLM's shape


class ErrorDetail(ResponseType):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseType):
    error: ErrorDetail
