"""Messages of clients in the form that templates know."""

from typing import Any

import pytest

from jaxserve.chat.messages import for_template
from jaxserve.errors import InputError

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}


def test_messages_are_what_templates_know():
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL], "reasoning": "I call."},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "3.", "reasoning_content": "So.", "tool_calls": []},
    ]
    assert for_template(given) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
            "reasoning_content": "I call.",
            "thinking": "I call.",
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "3.", "reasoning_content": "So.", "thinking": "So."},
    ]
    assert given[1]["tool_calls"] == [CALL]  # what was given is as it was


@pytest.mark.parametrize("arguments", ["", "{}", {}, None])
def test_no_arguments_are_an_empty_object(arguments: Any):
    call = CALL | {"function": {"name": "now", "arguments": arguments}}
    (message,) = for_template([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Hello", "messages[0] is no message"),
        ({"content": "Hello"}, "messages[0] is no message"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments is '{', which is no JSON object",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]},
            "is '[1]', which is no JSON object",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "messages[0].tool_calls[0] has no function"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, told: str):
    with pytest.raises(InputError) as caught:
        for_template([message])
    assert told in str(caught.value)
