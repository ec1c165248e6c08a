"""What an answer may be made of where tools are not left to the model: a grammar in Lark's syntax for each style.

`tool_styles.py` and `harmony.py` read what these let through.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxserve import lark
from jaxserve.chat.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START
from jaxserve.chat.tools import Function, Tools
from jaxserve.errors import InputError, Name
from jaxserve.sampling_params import ChatGrammar
from jaxserve.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams

_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)  # what every style can read
_PARAMETERS = "#/properties/parameters"  # where a function's schema is in that of a call in the form of Llama 3


class Marks(NamedTuple):
    """How a model writes the marks of its style."""

    special: Mapping[str, int]  # tokens that are none of the text, by their names
    template: str

    def mark(self, name: str) -> str:
        """An expression for a mark: its token, or its text if there is none."""
        return f"<[{self.special[name]}]>" if name in self.special else lark.quoted(name)


class Calls(NamedTuple):
    """How a style writes calls."""

    rules: list[str]  # of `call`, and of what it is made of
    trigger: str | None = None  # the mark that stands before each
    between: str | None = None  # an expression for what stands between two; None if `call` is all of them
    text: str = lark.ANY_TEXT  # a pattern of an answer that calls nothing, where no trigger tells


Style = Callable[[Tools, StructuredOutputsParams | None, Marks], Calls]


def hermes(tools: Tools, wanted: StructuredOutputsParams | None, marks: Marks) -> Calls:
    named = _alternatives(tools, lambda function: f"\n{_head(function)}")
    end = lark.quoted("}\n")
    rules = [f"call: named {end} {marks.mark('</tool_call>')}", f"named: {named}", *_arguments(tools, wanted)]
    return Calls(rules, trigger="<tool_call>", between=lark.quoted("\n"))


def llama3_json(tools: Tools, wanted: StructuredOutputsParams | None, marks: Marks) -> Calls:
    """All of a call is one JSON value, since an answer that is JSON begins like it."""
    functions = [
        f"function_{number}: {lark.json_value(_as_json(function), lenient=not function.strict, wanted=wanted)}"
        for number, function in enumerate(tools.callable)
    ]
    call = " | ".join(f"function_{number}" for number in range(len(functions)))
    text = r"/([^{ \t\r\n](.|\n)*)?/ & ~/(.|\n)*<\|python_tag\|>(.|\n)*/"
    return Calls([f"call: {call}", *functions], between=lark.quoted("; "), text=text)


def mistral(tools: Tools, wanted: StructuredOutputsParams | None, marks: Marks) -> Calls:
    """The newer templates write a name and its arguments after each mark, the older ones a list after one."""
    if "[ARGS]" in marks.template:
        id = f"{marks.mark('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/ " if "[CALL_ID]" in marks.template else ""
        call = _alternatives(tools, lambda function: function.name, before=f"{id}{marks.mark('[ARGS]')} ")
        return Calls([f"call: {call}", *_arguments(tools, wanted)], trigger="[TOOL_CALLS]", between="")
    one = _alternatives(tools, _head, after=' "}"')
    more = ' (", " one)*' if tools.parallel else ""
    return Calls([f'call: "[" one{more} "]"', f"one: {one}", *_arguments(tools, wanted)], trigger="[TOOL_CALLS]")


def of_calls(style: Style, tools: Tools, wanted: StructuredOutputsParams | None, marks: Marks) -> ChatGrammar:
    """Calls, and beside them what `wanted` says; or any text, if that is nothing and no call is required."""
    calls = style(tools, wanted, marks)
    several = tools.parallel and calls.between is not None
    trigger = "" if calls.trigger is None else f"{marks.mark(calls.trigger)} "
    all_calls = f"called ({calls.between} called)*" if several else "called"
    if tools.required:
        rules = [f"start: {all_calls}"]
    elif wanted:
        rules = [f"start: content | {all_calls}"]
    elif calls.trigger is None:
        rules = [f"start: TEXT | {all_calls}", f"TEXT: {calls.text}"]
    else:
        rules = ["start: (opened call)* TEXT" if several else "start: opened call | TEXT"]
        rules += _text_before(calls.trigger, marks)
    return _checked(tools, [*rules, f"called: {trigger}call", *calls.rules])


def of_channels(tools: Tools, wanted: StructuredOutputsParams | None, marks: Marks) -> ChatGrammar:
    """Harmony: the reasoning, if there is any, and then one message that calls a tool or is the answer."""
    channel, message = marks.mark(CHANNEL), marks.mark(MESSAGE)
    end = f'{marks.mark(END)} {marks.mark(START)} "assistant"'
    answers = [f'final: {channel} "final" {message} content']
    if tools.callable:
        json_follows = f' " " {marks.mark(CONSTRAIN)} "json" {message}'
        call = _alternatives(tools, lambda function: f"commentary to=functions.{function.name}", before=json_follows)
        answers += [f"call: {channel} ({call})", *_arguments(tools, wanted)]
    if tools.required:
        answer = "call"
    elif not tools.callable:
        answer = "final"
    else:
        answer = "(final | call)" if wanted else "preamble? (final | call)"
    rules = [
        f"start: analysis? {answer}",
        f'analysis: {channel} "analysis" {message} TEXT {end}',
        f'preamble: {channel} "commentary" {message} TEXT {end}',  # what the user is told before a call
        f"TEXT: {lark.ANY_TEXT}",
    ]
    return _checked(tools, rules + answers)


def _head(function: Function) -> str:
    """How a call that is JSON begins."""
    return f'{{"name": {json.dumps(function.name)}, "arguments": '


def _alternatives(tools: Tools, head: Callable[[Function], str], *, before: str = "", after: str = "") -> str:
    """An expression for a call of any of the tools: a head that names it, and its arguments."""
    return " | ".join(
        f"{lark.quoted(head(function))}{before} args_{number}{after}" for number, function in enumerate(tools.callable)
    )


def _arguments(tools: Tools, wanted: StructuredOutputsParams | None) -> list[str]:
    """Rules for the arguments of each tool. White space in them is as in what is wanted beside them."""
    return [
        f"args_{number}: {lark.json_value(function.parameters, lenient=not function.strict, wanted=wanted)}"
        for number, function in enumerate(tools.callable)
    ]


def _text_before(trigger: str, marks: Marks) -> list[str]:
    """Rules for text, and for text with the mark behind it, which it has nowhere else."""
    if trigger in marks.special:
        mark = re.escape(trigger)
        return [f"opened: TEXT {marks.mark(trigger)}", f"TEXT: {lark.ANY_TEXT} & ~/(.|\\n)*{mark}(.|\\n)*/"]
    return [f"opened[lazy]: TEXT {marks.mark(trigger)}", f"TEXT: {lark.ANY_TEXT}"]


def _as_json(function: Function) -> dict[str, Any]:
    """The schema of a call in the form of Llama 3. References in the parameters' schema lead to where it is now."""
    parameters = lark.changed(function.parameters, _moved)
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: dict[str, Any]) -> dict[str, Any]:
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        schema["$ref"] = _PARAMETERS + reference[1:]
    return schema


def _checked(tools: Tools, rules: list[str]) -> ChatGrammar:
    for function in tools.callable:
        if not _NAME.fullmatch(function.name):
            raise InputError(
                Name("tools"),
                f" has a function with the name {function.name[:200]!r}; for calls that follow its schema, give one of "
                "up to 128 letters, digits and the characters ._-",
            )
    text = "\n".join(rules)
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            Name("tools"),
            f" makes a grammar of {len(text)} characters and at most {MAX_CHARACTERS} are possible; shorten it",
        )
    return ChatGrammar(text)
