"""Messages in the one form that chat templates know, from the forms that clients send."""

import json
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import InputError

_SHOWN = 60  # characters of a wrong value that its error repeats


def for_template(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with content, reasoning and parsed arguments under the names that templates read. Nothing is None.

    The developer is OpenAI's newer name of the system, which hardly any template knows.
    """
    return [_for_template(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _for_template(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise InputError(f"{place} is no message; give a dict with a role and content", field="messages")
    message = {"content": ""} | {name: value for name, value in given.items() if value is not None}
    if message["role"] == "developer":
        message["role"] = "system"
    if reasoning := message.pop("reasoning", None) or message.get("reasoning_content"):
        message["reasoning_content"] = reasoning
        # gpt-oss' template reads `thinking`, and takes no content beside it where tools are called.
        if not (message["content"] and message.get("tool_calls")):
            message["thinking"] = reasoning
    if "tool_calls" in message:
        calls = [_parsed(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(message["tool_calls"])]
        message["tool_calls"] = calls
        if not calls:
            del message["tool_calls"]
    return message


def _parsed(call: Any, place: str) -> dict[str, Any]:
    """A call with its arguments as a dict, since each template writes them in its model's own way."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{place} has no function with a name; give calls as they came", field="messages")
    arguments = parsed_arguments(function.get("arguments"), f"{place}.function.arguments")
    return call | {"function": function | {"arguments": arguments}}


def parsed_arguments(given: Any, place: str) -> dict[str, Any]:
    """A call's arguments as a dict; `InputError` tells of their place if they cannot be."""
    arguments = given or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        shown = repr(given)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise InputError(f"{place} is {shown}, which is no JSON object; give one", field="messages")
    return arguments
