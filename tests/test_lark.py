"""What is wanted of a text, in Lark's syntax: JSON's schemas reach llguidance as they are meant."""

import json

import pytest

from jaxserve import lark
from jaxserve.errors import InputError
from jaxserve.structured_outputs import StructuredOutputsParams


def schema_in(rule: str) -> dict:
    return json.loads(rule.partition("%json ")[2])


def rule_of(**form: object) -> str:
    return lark.rule("content", StructuredOutputsParams(**form))


def test_a_schema_is_passed_on_with_its_white_space():
    schema = {"type": "object", "properties": {"exclusiveMinimum": {"enum": [{"exclusiveMinimum": 1}]}}}
    options = {"whitespace_pattern": lark.WHITE_SPACE, "lenient": False}
    assert schema_in(rule_of(json=schema)) == schema | {"x-guidance": options}
    without = schema_in(rule_of(json=schema, disable_any_whitespace=True))["x-guidance"]
    assert without == {"whitespace_flexible": False, "lenient": False}
    given = schema_in(rule_of(json=schema | {"x-guidance": {"coerce_one_of": True}}))["x-guidance"]
    assert given == options | {"coerce_one_of": True}


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({"type": "number", "exclusiveMinimum": 3, "maximum": 3.5}, {"exclusiveMinimum": 3.000001}),
        ({"exclusiveMaximum": -1, "minimum": -1.5}, {"exclusiveMaximum": -1.000001}),
        ({"type": "number", "exclusiveMinimum": 3.25}, {"exclusiveMinimum": 3.25}),
        ({"type": "integer", "exclusiveMinimum": 3}, {"exclusiveMinimum": 3}),
        ({"minimum": 3, "exclusiveMinimum": True}, {"exclusiveMinimum": True}),
    ],
)
def test_an_open_end_at_a_whole_number_is_moved_by_a_millionth_wherever_it_stands(given: dict, passed: dict):
    nested = {"anyOf": [{"items": given}], "$defs": {"a": given}, "const": given}
    found = schema_in(rule_of(json=nested))
    assert found["anyOf"] == [{"items": given | passed}]
    assert found["$defs"] == {"a": given | passed}
    assert found["const"] == given


def test_a_change_reaches_the_schemas_of_properties_of_any_name_and_no_values():
    reference = {"$ref": "#/$defs/a"}
    schema = {"properties": {"enum": reference, "$ref": {"items": [reference]}}, "const": reference}
    moved = lark.changed(schema, lambda found: found | ({"$ref": "#/b"} if isinstance(found.get("$ref"), str) else {}))
    there = {"$ref": "#/b"}
    assert moved == {"properties": {"enum": there, "$ref": {"items": [there]}}, "const": reference}
    assert schema["properties"]["enum"] == {"$ref": "#/$defs/a"}


def test_what_stands_for_any_text_and_for_any_json():
    assert lark.rule("content", None) == f"content: {lark.ANY_TEXT}"
    assert schema_in(rule_of(json=True)).keys() == {"x-guidance"}
    assert schema_in(rule_of(json_object=True))["type"] == "object"


@pytest.mark.parametrize("text", ["", "{", "[1]", "false", "3"])
def test_what_is_no_schema_is_refused_by_the_name_that_it_was_given_by(text: str):
    with pytest.raises(InputError, match=r"^response_format is ") as raised:
        rule_of(json=text, given_as="response_format")
    assert raised.value.field == "response_format"


def test_only_known_tokens_are_no_text():
    class Token:
        def __init__(self, content: str, special: bool):
            self.content, self.special = content, special

    class Tokenizer:
        added_tokens_decoder = {5: Token("<s>", True), 6: Token("<tool>", False), 7: Token("plain", False)}

    assert lark.special_tokens(Tokenizer()) == {"<s>": 5, "<tool>": 6}
    assert lark.special_tokens(None) == {}
