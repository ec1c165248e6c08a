"""What a text has to be, in the Lark syntax that llguidance reads.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import InputError
from jaxserve.structured_outputs import StructuredOutputsParams

ANY_TEXT = r"/(.|\n)*/"
# At most so much between two parts of JSON: models that may write blanks without an end sometimes do.
WHITE_SPACE = r"[ \t\r\n]{1,32}"

_VALUES = ("const", "enum", "default", "examples", "x-guidance")  # keywords with no schemas in them
_NAMES = ("properties", "patternProperties", "$defs", "definitions")  # and with schemas by any names
_SMALL = 1e-6


def quoted(text: str) -> str:
    """A terminal that is just this text."""
    return json.dumps(text).replace("\x7f", r"\u007f")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of the tokens that llguidance takes for none of the text, by their names."""
    added = tokenizer.added_tokens_decoder.items() if tokenizer is not None else ()
    return {
        token.content: id
        for id, token in added
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }


def told(error: str) -> str:
    """What llguidance says is wrong with a grammar, in a line of words."""
    line = next(iter(error.strip().splitlines()), "no reason given")
    return "it leaves nothing that may come next" if line == "NoExtensionBias" else line


def json_value(
    schema: Mapping[str, Any], *, lenient: bool = False, wanted: StructuredOutputsParams | None = None
) -> str:
    """An expression for what a JSON schema allows. With `lenient`, keywords that are not supported are left out of it.

    White space between the parts is what `wanted` says of it.
    """
    options: dict[str, Any] = {"whitespace_pattern": WHITE_SPACE, "lenient": lenient}
    if wanted and wanted.whitespace_pattern is not None:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    elif wanted and wanted.disable_any_whitespace:
        options = {"whitespace_flexible": False, "lenient": lenient}
    given = schema.get("x-guidance")  # llguidance's own options
    return "%json " + json.dumps(
        {**changed(schema, _mended), "x-guidance": options | given if isinstance(given, dict) else options}
    )


def changed(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of a JSON schema in which `change` has been made to it and to each schema within, innermost first."""
    if isinstance(schema, list):
        return [changed(each, change) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy = {}
    for key, value in schema.items():
        if key in _NAMES and isinstance(value, Mapping):
            copy[key] = {name: changed(each, change) for name, each in value.items()}
        else:
            copy[key] = value if key in _VALUES else changed(value, change)
    return change(copy)


def rule(name: str, wanted: StructuredOutputsParams | None) -> str:
    """A rule for structured outputs, or for any text; `InputError` for what is no JSON."""
    if wanted is None:
        return f"{name}: {ANY_TEXT}"
    if wanted.form in ("json", "json_object"):
        return f"{name}: {json_value(_schema(wanted), wanted=wanted)}"
    if wanted.choice is not None:
        terminal = name.upper()  # of all choices: as rules, each of them would cost at every step
        return f"{name}: {terminal}\n{terminal}: " + " | ".join(map(quoted, wanted.choice))
    if wanted.regex is not None:
        from llguidance import regex_to_lark  # here, since most engines never need it

        return f"{name}: /{regex_to_lark(wanted.regex, '')}/"
    return f"{name}: %lark {{\n{wanted.grammar}\n}}"


def _mended(schema: dict[str, Any]) -> dict[str, Any]:
    """The same without what llguidance 1.9 gets wrong: of the numbers above 3 and up to 3.5, 3 is one to it."""
    if schema.get("type") != "integer":
        for key, step in (("exclusiveMinimum", _SMALL), ("exclusiveMaximum", -_SMALL)):
            bound = schema.get(key)
            if isinstance(bound, int | float) and not isinstance(bound, bool) and abs(bound) < 2**32:
                schema[key] = bound + step if bound == int(bound) else bound
    return schema


def _schema(wanted: StructuredOutputsParams) -> dict[str, Any]:
    text = wanted.json if isinstance(wanted.json, str) else '{"type": "object"}'  # a dict has become a text
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{wanted.name} is no JSON ({error}); give a schema", field=wanted.given_as) from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InputError(f"{wanted.name} is {text[:60]}; give an object", field=wanted.given_as)
    return schema
