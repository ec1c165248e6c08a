"""What the text of an answer has to be, in the forms of each API."""

from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from jaxserve.errors import InputError
from jaxserve.server.protocol.base import GenerationRequest, ObjectOrText, RequestType, refusal, within
from jaxserve.structured_outputs import StructuredOutputsParams


class NamedSchema(RequestType):
    name: str
    description: str | None = None
    of_json: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # an answer follows its schema either way


class ResponseFormat(RequestType):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal("json_schema", "json_schema goes with type 'json_schema', which needs it; give both or none")
        return self

    def settings(self) -> dict[str, Any] | None:
        """In `StructuredOutputsParams`' names; None for any text."""
        return _settings(self.type, self.json_schema.of_json if self.json_schema else None)


class TextFormat(RequestType):
    """The same as `/v1/responses` has it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    of_json: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "TextFormat":
        if self.type == "json_schema":
            if self.name is None or self.of_json is None:
                field = "name" if self.name is None else "schema"
                raise refusal(field, f"{field} is missing; type 'json_schema' needs a name and a schema")
        elif given := sorted(self.model_dump(by_alias=True, exclude_none=True).keys() - {"type"}):
            raise refusal(given[0], f"{given[0]} does not go with type {self.type!r}; it is of type 'json_schema'")
        return self

    def settings(self) -> dict[str, Any] | None:
        return _settings(self.type, self.of_json)


class OutputFormat(RequestType):
    """The same as Anthropic has it."""

    type: Literal["json_schema"]
    of_json: dict[str, Any] = Field(alias="schema")


class StructuredOutputs(RequestType):
    """vLLM's."""

    unsupported = {
        "disable_additional_properties": (False,),
        "disable_fallback": (False, True),  # there is nothing to fall back to
        "structural_tag": (),
    }

    of_json: ObjectOrText = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class StructuredRequest(GenerationRequest):
    """What both kinds of completions have for it: OpenAI's field, vLLM's, and vLLM's older ones. One at a time."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: ObjectOrText = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    _wanted: StructuredOutputsParams | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _read_wanted(self) -> "StructuredRequest":
        given: dict[str, dict[str, Any]] = {}
        if self.response_format and (settings := self.response_format.settings()):
            given["response_format"] = settings
        if self.structured_outputs:
            given["structured_outputs"] = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        for form in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{form}")) is not None:
                given[f"guided_{form}"] = {form: value}
        if len(given) > 1:
            first, second, *_ = given
            raise refusal(second, f"{first} and {second} are both given; give one of them")
        pattern = self.guided_whitespace_pattern
        for field, settings in given.items():
            if pattern is not None and settings.keys() & {"json", "json_object"}:
                settings = {"whitespace_pattern": pattern} | settings
                pattern = None
            self._wanted = structured_outputs(field, settings)
        if pattern is not None:
            raise refusal(
                "guided_whitespace_pattern",
                "guided_whitespace_pattern is of white space in JSON, and none is asked for; leave it out",
            )
        return self

    def sampling_settings(self) -> dict[str, Any]:
        return super().sampling_settings() | {"structured_outputs": self._wanted}


def structured_outputs(field: str, settings: dict[str, Any]) -> StructuredOutputsParams:
    """What was given in this field; if that cannot be, the error is about it."""
    try:
        return StructuredOutputsParams(**settings, given_as=field)
    except InputError as error:
        names = within(field, settings) if field == "structured_outputs" else dict.fromkeys(settings, field)
        raise refusal(field, error.told(names)) from error


def _settings(type: str, schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if type == "text":
        return None
    return {"json_object": True} if schema is None else {"json": schema}
