"""Which tools are called, where that is not left to the model: over the wire, in Python, streamed and whole."""

import json
import re
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pydantic
import pytest

from jaxserve import RequestOutput
from tests.server.cases import (
    CAPITAL,
    CONVERSATION,
    MODEL_NAME,
    NAMED_NEWS,
    TOOLS,
    WEATHER,
    WEATHER_ARGUMENTS,
    WEATHER_ASKED,
    error,
    events,
    message_of,
)
from tests.server.test_chat_answers import without_ids

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
GREEDY = {"temperature": 0, "max_tokens": 300}


def bounded(tool: dict[str, Any]) -> dict[str, Any]:
    """With short arguments: the demo model may not come to their end where it would make no call by itself."""
    parameters = tool["function"]["parameters"]
    properties = {name: schema | {"maxLength": 12} for name, schema in parameters["properties"].items()}
    parameters = parameters | {"properties": properties, "additionalProperties": False}
    return {"type": "function", "function": tool["function"] | {"parameters": parameters}}


BOUNDED = [bounded(tool) for tool in TOOLS]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in BOUNDED}
ALLOWED = {"mode": "required", "tools": [NAMED_NEWS]}
ANTHROPIC_TOOLS = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (tool["function"] for tool in BOUNDED)
]
STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]


def both(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The choice of a whole answer, which the stream of the same has to add up to."""
    asked = {"messages": CONVERSATION, "tools": TOOLS} | GREEDY | fields
    response = client.post(CHAT, json=asked)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    chunks = events(client.post(CHAT, json=asked | {"stream": True}))
    streamed = message_of(chunks)
    if "tool_calls" in choice["message"]:
        assert without_ids(streamed) == without_ids(choice["message"])
    else:
        assert streamed == choice["message"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return choice


def called(choice: dict[str, Any]) -> list[str]:
    """The names of what a choice calls, with arguments that follow their schemas."""
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
    return [call["name"] for call in calls]


def test_a_required_call_is_made_where_the_model_would_make_none(client: httpx.Client) -> None:
    assert called(both(client)) == []
    choice = both(client, tools=BOUNDED, tool_choice="required")
    assert called(choice)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"]


def test_a_named_tool_is_called_and_the_reason_is_openais(
    client: httpx.Client, offline: dict[str, RequestOutput]
) -> None:
    choice = both(client, tool_choice=NAMED_NEWS)
    assert called(choice) == ["find_news"]
    assert choice["finish_reason"] == "stop"  # as OpenAI and vLLM have it for a tool that is named
    (expected,) = offline["named tool"].outputs
    assert expected.message
    assert without_ids(choice["message"]) == without_ids(expected.message)


def test_a_call_that_the_model_makes_anyway_stays_as_it_is(client: httpx.Client) -> None:
    asked = {"messages": [WEATHER_ASKED]}
    free = both(client, **asked)
    for fields in ({"tool_choice": "required"}, {"tools": STRICT}, {"tool_choice": "auto", "tools": STRICT}):
        choice = both(client, **asked | fields)
        assert without_ids(choice["message"]) == without_ids(free["message"])
        assert choice["finish_reason"] == "tool_calls"


def test_strict_tools_leave_an_answer_in_words_alone(client: httpx.Client) -> None:
    assert both(client, tools=STRICT)["message"] == both(client)["message"]


def test_strict_arguments_follow_a_schema_that_the_model_would_not(client: httpx.Client) -> None:
    days = {"type": "object", "properties": {"city": {"const": "Oslo"}, "day": {"enum": ["Friday"]}}}
    days |= {"required": ["city", "day"], "additionalProperties": False}
    tool = {"type": "function", "function": WEATHER["function"] | {"parameters": days, "strict": True}}
    choice = both(client, messages=[WEATHER_ASKED], tools=[tool])
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "day": "Friday"}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_called(client: httpx.Client, mode: str) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": ALLOWED | {"mode": mode}}
    asked = {"messages": [WEATHER_ASKED], "tools": BOUNDED}
    names = called(both(client, tool_choice=choice, parallel_tool_calls=False, **asked))
    assert names in ([["find_news"]] if mode == "required" else [[], ["find_news"]])


def test_without_parallel_calls_there_is_one_at_most(client: httpx.Client) -> None:
    calls = [
        called(both(client, tools=BOUNDED, tool_choice="required", parallel_tool_calls=parallel))
        for parallel in (True, False)
    ]
    assert len(calls[1]) == 1
    assert calls[0][:1] == calls[1]


def test_an_answer_with_a_form_may_be_a_call_instead(client: httpx.Client) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL}}
    assert called(both(client, messages=[WEATHER_ASKED], response_format=format)) == ["get_weather"]
    words = {"structured_outputs": {"regex": r"The capital of [A-Z][a-z]{1,6} is (Rome|Oslo)"}}
    answered = both(client, **words)
    assert called(answered) == []
    assert re.fullmatch(words["structured_outputs"]["regex"], answered["message"]["content"])


def test_a_call_may_follow_a_bounded_thought(client: httpx.Client) -> None:
    choice = both(client, tools=BOUNDED, tool_choice="required", parallel_tool_calls=False, thinking_token_budget=2)
    assert len(called(choice)) == 1


class get_weather(pydantic.BaseModel):
    """Get the weather"""

    city: str
    day: str


def test_the_openai_sdk_parses_strict_tools(sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": [WEATHER_ASKED], "temperature": 0}
    tools = [openai.pydantic_function_tool(get_weather)]
    completion = sdk.chat.completions.parse(**asked, tools=tools, tool_choice="required")
    (call,) = completion.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, get_weather)
    with sdk.chat.completions.stream(**asked, tools=tools, tool_choice="required") as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


def test_responses_call_what_they_have_to(sdk: openai.OpenAI) -> None:
    tools = [{"type": "function", "strict": True} | f for f in (tool["function"] for tool in BOUNDED)]
    asked: dict[str, Any] = {"model": MODEL_NAME, "input": CONVERSATION, "tools": tools, "temperature": 0}
    named = {"type": "function", "name": "find_news"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        response = sdk.responses.create(**asked, tool_choice=choice, parallel_tool_calls=False)
        (call,) = [item for item in response.output if item.type == "function_call"]
        assert call.name == "find_news"
        jsonschema.validate(json.loads(call.arguments), SCHEMAS["find_news"])
        assert response.tool_choice.to_dict() == choice
        assert [tool.strict for tool in response.tools] == [True, True]
    parsed = sdk.responses.parse(**asked, tool_choice="required", parallel_tool_calls=False)
    assert [item.type for item in parsed.output] == ["reasoning", "function_call"]


def test_anthropics_sdk_has_tools_called(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": CONVERSATION[1:], "max_tokens": 300}
    asked["tools"] = ANTHROPIC_TOOLS
    for choice, name in (
        ({"type": "any", "disable_parallel_tool_use": True}, None),
        ({"type": "tool", "name": "find_news"}, "find_news"),
    ):
        answer = claude.messages.create(**asked, tool_choice=choice)
        assert answer.stop_reason == "tool_use"
        assert [block.type for block in answer.content] == ["thinking", "tool_use"]
        use = answer.content[1]
        assert use.name == name or name is None
        jsonschema.validate(use.input, SCHEMAS[use.name])
        with claude.messages.stream(**asked, tool_choice=choice) as stream:
            final = stream.get_final_message()
        assert (final.content[1].name, final.content[1].input) == (use.name, use.input)
    none = claude.messages.create(**asked | {"messages": [WEATHER_ASKED]}, tool_choice={"type": "none"})
    assert none.stop_reason == "end_turn"
    strict = [tool | {"strict": True} for tool in ANTHROPIC_TOOLS]
    used = claude.messages.create(**asked | {"messages": [WEATHER_ASKED], "tools": strict}).content[-1]
    assert (used.name, used.input) == ("get_weather", WEATHER_ARGUMENTS)


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"tools": function(parameters=[1])}, "tools", "parameters is a list"),
        ({"tools": function(parameters={"type": "string"})}, "tools", "'string'"),
        ({"tools": function(strict="yes")}, "tools", "strict is 'yes'"),
        ({"tools": function(name="")}, "tools", "no function with a name"),
        ({"tools": function(strict=True, parameters={"$ref": "#/none"})}, "tools", "tools cannot be followed"),
        ({"tools": function(strict=True, parameters={"not": {}})}, "tools", "tools cannot be followed"),
        ({"tools": function(parameters={"properties": 5}), "tool_choice": "required"}, "tools", "cannot be followed"),
        ({"tools": function(name='a"\n%json {}'), "tool_choice": "required"}, "tools", "name"),
        ({"tools": function(name="\u0000"), "tool_choice": "required"}, "tools", "name"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "give 'none'"),
        ({"tool_choice": NAMED_NEWS | {"also": 1}}, "tool_choice", "give 'none'"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice", "give 'none'"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "not among the tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools"),
        ({"tool_choice": 5}, "tool_choice", "tool_choice is a int"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED | {"tools": []}}},
            "tool_choice",
            "no tool",
        ),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED | {"tools": [5]}}}, "tool_choice", "name"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED | {"mode": "any"}}}, "tool_choice", "give"),
    ],
)
def test_what_cannot_be_called_is_refused_by_its_field(
    client: httpx.Client, fields: dict[str, Any], param: str, told: str
) -> None:
    asked = {"messages": CONVERSATION, "tools": TOOLS, "max_tokens": 5} | fields
    found = error(client.post(CHAT, json=asked), 400)
    assert found["param"] == param
    assert told in found["message"]


def test_deep_and_wide_parameters_harm_nobody(client: httpx.Client) -> None:
    many = [tool for number in range(60) for tool in function(name=f"f{number}", parameters=nested(3))]
    for tools in (function(parameters=nested(80)), many):
        asked = {"messages": CONVERSATION, "tools": tools, "max_tokens": 2, "tool_choice": "required"}
        assert client.post(CHAT, json=asked).status_code in (200, 400)
    assert client.post(CHAT, json={"messages": CONVERSATION, "max_tokens": 1}).status_code == 200
