"""A few hundred JSON schemas: every answer of the demo model is what its schema allows, by `jsonschema`'s reading."""

import json
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from jaxserve import LLM, InputError, SamplingParams, StructuredOutputsParams

Schema = dict[str, Any] | bool

SEEDED = 260  # schemas, beside the written ones
NAMES = ["name", "age", "id", "city", "x", "tags", "größe", "a b", 'say "hi"', "back\\slash", "new\nline", "é/~"]

WRITTEN: dict[str, Schema] = {
    "anything": {},
    "anything, by true": True,
    "an object of anything": {"type": "object"},
    "an object of nothing": {"type": "object", "additionalProperties": False},
    "an object with true and false": {
        "type": "object",
        "properties": {"a": True, "b": False, "c": {"type": "null"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "a const object": {"const": {"a": [1, None, "x"], "b": {"c": 0.5}}},
    "mixed enum": {"enum": [1, "1", None, True, [2], {"a": "b"}, "\N{GRINNING FACE}", 'quote"', ""]},
    "many types": {"type": ["string", "null", "integer", "boolean"], "maxLength": 3, "minimum": 4, "maximum": 40},
    "one of types": {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    "all of bounds": {"allOf": [{"type": "integer", "minimum": -20}, {"maximum": 5}, {"multipleOf": 3}]},
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"]},
        ],
    },
    "a tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    "a tuple and more": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}],
        "items": {"type": "integer", "minimum": 0, "maximum": 3},
        "minItems": 2,
        "maxItems": 4,
    },
    "a linked list": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "a tree": {
        "type": "object",
        "properties": {"is": {"enum": ["leaf", "node"]}, "children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["is"],
        "additionalProperties": False,
    },
    "two that name each other": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2},
            "b": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/a"}]},
        },
    },
    "an older name of definitions": {"definitions": {"a": {"enum": [1, 2]}}, "$ref": "#/definitions/a"},
    "an anchor": {"$defs": {"a": {"$anchor": "here", "type": "boolean"}}, "$ref": "#here"},
    "a map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99}},
    "a map with an entry": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    "names by pattern": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,4}$": {"type": "integer", "minimum": 0, "maximum": 99}},
        "additionalProperties": False,
    },
    "a pattern anywhere": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 12},
    "a pattern with a length": {"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 5},
    "above and below": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "between two numbers": {"type": "integer", "minimum": -1000, "exclusiveMaximum": -997},
    "cents": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 10},
    "annotations": {"title": "t", "description": "d", "default": 3, "examples": [1], "$comment": "c", "enum": [3, 4]},
    "text of one letter": {"type": "string", "minLength": 1, "maxLength": 1},
    "no text": {"type": "string", "maxLength": 0},
    "no items": {"type": "array", "maxItems": 0},
}

UNSUPPORTED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "dynamicRef": {"$dynamicRef": "#x"},
    "oneOf": {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "maximum": 5}]},
    "format": {"type": "string", "format": "uri-template"},
    "deep within": {"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}},
}


def schema_of(seed: int) -> Schema:
    """One made of the blocks below; it names what it uses in `$defs`."""
    random, definitions = Random(seed), {}
    schema = _any(random, definitions, depth=random.randint(0, 2))
    return schema | {"$defs": definitions} if definitions and isinstance(schema, dict) else schema


def _any(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    blocks = [_object, _array, _tuple, _any_of, _one_of, _reference] if depth else [_integer, _number, _text, _fixed]
    if depth and random.random() < 0.2:
        blocks = [_integer, _number, _text, _fixed]
    return random.choice(blocks)(random, definitions, depth - 1)


def _integer(random: Random, *_: object) -> dict[str, Any]:
    low = random.randint(-1000, 1000)
    schema = {"type": "integer", random.choice(["minimum", "exclusiveMinimum"]): low}
    schema[random.choice(["maximum", "exclusiveMaximum"])] = low + random.choice([7, 50, 100_000])
    if random.random() < 0.4:
        schema["multipleOf"] = random.choice([2, 3, 5])
    return schema


def _number(random: Random, *_: object) -> dict[str, Any]:
    low = round(random.uniform(-100, 100), random.randint(0, 3))
    schema = {"type": "number", random.choice(["minimum", "exclusiveMinimum"]): low}
    schema[random.choice(["maximum", "exclusiveMaximum"])] = round(low + random.choice([0.5, 3.25, 1000]), 3)
    if random.random() < 0.5:
        schema["multipleOf"] = random.choice([0.5, 0.25, 0.1, 0.01])
    return schema


def _text(random: Random, *_: object) -> dict[str, Any]:
    match random.randint(0, 2):
        case 0:
            low = random.randint(0, 4)
            return {"type": "string", "minLength": low, "maxLength": low + random.randint(0, 12)}
        case 1:
            patterns = [
                "^[A-Z]{2}-[0-9]{3}$",
                "^(red|green|blue)$",
                r"^\d{1,3}(,\d{3})*$",
                "^[a-zé]{2,8}$",
                r"^\w+@\w+$",
            ]
            return {"type": "string", "pattern": random.choice(patterns), "maxLength": 16}
        case _:
            formats = ["date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid", "email", "hostname"]
            return {"type": "string", "format": random.choice(formats), "maxLength": 40}


def _fixed(random: Random, *_: object) -> dict[str, Any]:
    values = ["red", "blue", "", 'a"b', 1, -2.5, True, None, ["x"], {"a": 1}]
    return random.choice(
        [
            {"const": random.choice(values)},
            {"enum": random.sample(values, 4)},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["boolean", "null"]},
        ]
    )


def _object(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    names = random.sample(NAMES, random.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(random, definitions, depth) for name in names},
        "required": random.sample(names, random.randint(0, len(names))),
        "additionalProperties": False,
    }
    if random.random() < 0.2:
        schema["additionalProperties"] = _any(random, definitions, 0)
    return schema


def _array(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    least = random.randint(0, 2)
    items = _any(random, definitions, depth)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + random.randint(0, 2)}


def _tuple(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    first = [_any(random, definitions, depth) for _ in range(random.randint(1, 3))]
    rest: Schema = random.choice([False, {"type": "boolean"}])
    return {"type": "array", "prefixItems": first, "items": rest, "minItems": len(first), "maxItems": len(first) + 1}


def _any_of(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(random, definitions, depth), random.choice([{"type": "null"}, _integer(random)])]}


def _one_of(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    return {"oneOf": [_object(random, definitions, depth), _text(random), {"type": "boolean"}]}


def _reference(random: Random, definitions: dict[str, Schema], depth: int) -> dict[str, Any]:
    name = f"d{len(definitions)}"
    definitions[name] = True  # its place, while it is made
    definitions[name] = _any(random, definitions, depth)
    return {"$ref": f"#/$defs/{name}"}


@pytest.fixture(scope="module")
def llm():
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 640, "page_size": 16}
    with LLM(**settings, progress=False) as llm:
        yield llm


def read(text: str) -> Any:
    """With exact decimals, for `multipleOf`."""
    return json.loads(text, parse_float=Decimal)


def test_every_answer_is_what_its_schema_allows(llm: LLM):
    schemas = [*WRITTEN.values(), *map(schema_of, range(SEEDED))]
    wanted = [
        StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=bool(number % 2))
        for number, schema in enumerate(schemas)
    ]
    prompt = llm.render_chat([{"role": "user", "content": "Give me some JSON."}])
    params = [
        # The penalty keeps the demo model from repeating a digit for ever.
        SamplingParams(temperature=1, frequency_penalty=0.2, seed=number, max_tokens=500, structured_outputs=each)
        for number, each in enumerate(wanted)
    ]
    answers = [output.outputs[0] for output in llm.generate([prompt] * len(params), params)]
    finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.finish_reason == "length":
            continue
        assert answer.finish_reason == "stop", (answer.stop_reason, schema)
        finished += 1
        validator = Draft202012Validator(read(json.dumps(schema)), format_checker=Draft202012Validator.FORMAT_CHECKER)
        try:
            problems = [error.message for error in validator.iter_errors(read(answer.text))]
        except ValueError as error:
            problems = [str(error)]
        assert not problems, (schema, answer.text)
    assert finished >= 0.95 * len(schemas), [
        (schema, answer.text)
        for schema, answer in zip(schemas, answers, strict=True)
        if answer.finish_reason == "length"
    ]
    assert len({answer.text for answer in answers}) > 0.6 * len(schemas)  # they are the model's, and not all alike


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_schema_with_what_is_not_supported_is_refused_before_anything_runs(llm: LLM, name: str):
    wanted = StructuredOutputsParams(json=UNSUPPORTED[name])
    keyword = "not" if name == "deep within" else name
    with pytest.raises(InputError, match=rf"json cannot be followed \(.*{keyword}"):
        llm.generate(["Hello"] * 2, [SamplingParams(), SamplingParams(structured_outputs=wanted)])
    assert not llm.engine.has_unfinished


def test_the_schemas_use_every_keyword_that_they_are_meant_to_try():
    used = json.dumps([*WRITTEN.values(), *map(schema_of, range(SEEDED))])
    for keyword in (
        *("minimum", "exclusiveMinimum", "multipleOf", "enum", "const", "minLength", "maxLength", "pattern", "format"),
        *("properties", "required", "additionalProperties", "patternProperties", "items", "prefixItems", "minItems"),
        *("maxItems", "$ref", "$defs", "anyOf", "oneOf", "allOf"),
    ):
        assert f'"{keyword}"' in used
