"""Prompts, in the forms that OpenAI's API takes them in."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _listed(given: Any, field: ValidationInfo) -> list[str | list[int]]:
    """Any of the four forms as a list."""
    if isinstance(given, str) or _is_token_ids(given):
        return [given]
    if isinstance(given, list) and given and all(isinstance(one, str) or _is_token_ids(one) for one in given):
        return given
    raise ValueError(
        f"{field.field_name} is none of a string, a list of token ids, or a list of such prompts; give one of these"
    )


Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_listed, json_schema_input_type=str | list[int] | list[str | list[int]]),
]
