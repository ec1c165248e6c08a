"""Reasoning and tool calls of the demo model, over the wire and in Python, streamed and whole."""

import json
from typing import Any

import httpx
import openai
import pytest

from jaxserve import RequestOutput
from tests.server.cases import (
    CONVERSATION,
    MODEL_NAME,
    TOOLS,
    WEATHER_ARGUMENTS,
    WEATHER_ASKED,
    events,
    message_of,
)

GREEDY = {"temperature": 0, "max_tokens": 200}
CHAT = "/v1/chat/completions"


def choice_of(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": CONVERSATION} | GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chunks_of(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    return events(client.post(CHAT, json={"messages": CONVERSATION, "stream": True} | GREEDY | fields))


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls are each answer's own."""
    return message | {"tool_calls": [call | {"id": ""} for call in message["tool_calls"]]}


def test_reasoning_is_told_from_the_answer(client: httpx.Client, offline: dict[str, RequestOutput]) -> None:
    expected = offline["whole chat"].outputs[0]
    assert expected.message
    assert expected.message["reasoning_content"]
    assert "Paris" in expected.message["content"]
    assert "think>" not in str(expected.message)
    assert expected.text.startswith("<think>")
    assert choice_of(client)["message"] == expected.message
    assert message_of(chunks_of(client)) == expected.message


def test_reasoning_comes_before_the_answer_in_a_stream(client: httpx.Client) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(client)]
    answering = [index for index, delta in enumerate(deltas) if delta.get("content")]
    thinking = [index for index, delta in enumerate(deltas) if delta.get("reasoning_content")]
    assert thinking[-1] <= answering[0]  # one delta may hold the end of one and the start of the other


def test_reasoning_may_be_left_out(client: httpx.Client, offline: dict[str, RequestOutput]) -> None:
    expected = offline["whole chat"].outputs[0].message
    assert expected
    message = choice_of(client, include_reasoning=False)["message"]
    assert message == {"role": "assistant", "content": expected["content"]}
    assert message_of(chunks_of(client, include_reasoning=False)) == message


def test_without_thinking_there_is_no_reasoning(client: httpx.Client) -> None:
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        message = choice_of(client, **off)["message"]
        assert "Paris" in message["content"]
        assert "reasoning_content" not in message


def test_a_tool_is_called(client: httpx.Client, offline: dict[str, RequestOutput]) -> None:
    expected = offline["tools"].outputs[0]
    assert expected.message
    assert expected.finish_reason == "stop"
    (call,) = expected.message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == WEATHER_ARGUMENTS
    assert call["function"]["arguments"] in expected.text  # just as the model wrote it
    asked = {"messages": [WEATHER_ASKED], "tools": TOOLS}
    choice = choice_of(client, **asked)
    assert choice["finish_reason"] == "tool_calls"
    assert without_ids(choice["message"]) == without_ids(expected.message)
    chunks = chunks_of(client, **asked)
    assert without_ids(message_of(chunks)) == without_ids(expected.message)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "tool_calls"
    pieces = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [part["function"].get("name") for part in pieces] == ["get_weather"] + [None] * (len(pieces) - 1)


def test_the_conversation_goes_on_with_the_tools_result(client: httpx.Client) -> None:
    asked = {"messages": [WEATHER_ASKED], "tools": TOOLS}
    message = choice_of(client, **asked)["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "weather sunny, event 12"}
    again = choice_of(client, messages=[WEATHER_ASKED, message, result], tools=TOOLS)
    assert again["message"]["content"] == "The result is: weather sunny, event 12."


def test_tools_that_may_not_be_called_are_not_shown(client: httpx.Client) -> None:
    asked = {"messages": [WEATHER_ASKED], "return_token_ids": True, "max_tokens": 1}
    prompts = [
        client.post(CHAT, json=asked | fields).json()["prompt_token_ids"]
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "auto"})
    ]
    assert prompts[0] == prompts[1] != prompts[2]


def test_an_answer_that_is_cut_within_a_call_keeps_what_it_has(client: httpx.Client) -> None:
    asked = {"messages": [WEATHER_ASKED], "tools": TOOLS}
    whole = choice_of(client, **asked, return_token_ids=True)
    arguments = whole["message"]["tool_calls"][0]["function"]["arguments"]
    for count in range(1, len(whole["token_ids"])):
        choice = choice_of(client, **asked | {"max_tokens": count})
        assert choice["finish_reason"] == "length"
        for call in choice["message"].get("tool_calls", []):
            assert arguments.startswith(call["function"]["arguments"])
        chunks = chunks_of(client, **asked | {"max_tokens": count})
        streamed = message_of(chunks)
        if "tool_calls" in streamed:
            assert without_ids(streamed) == without_ids(choice["message"])
        else:
            assert streamed == choice["message"]


def test_the_openai_sdk_reads_calls_and_reasoning(server: str, offline: dict[str, RequestOutput]) -> None:
    expected = offline["tools"].outputs[0].message
    assert expected
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as sdk:
        asked: dict[str, Any] = {"model": MODEL_NAME, "messages": [WEATHER_ASKED], "tools": TOOLS, "temperature": 0}
        message = sdk.chat.completions.create(**asked).choices[0].message
        assert without_ids(message.to_dict()) == without_ids(expected)
        with sdk.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        (call,) = final.message.tool_calls
        assert (call.function.name, call.function.arguments) == (
            "get_weather",
            expected["tool_calls"][0]["function"]["arguments"],
        )
        # The SDK's own record of the answer may be sent back.
        result = {"role": "tool", "tool_call_id": call.id, "content": "weather sunny, event 12"}
        again = sdk.chat.completions.create(**asked | {"messages": [WEATHER_ASKED, message, result]})
        assert again.choices[0].message.content == "The result is: weather sunny, event 12."


@pytest.mark.parametrize("field", ["skip_special_tokens", "return_token_ids"])
def test_fields_about_tokens_do_not_disturb_the_parsing(
    client: httpx.Client, offline: dict[str, RequestOutput], field: str
) -> None:
    expected = offline["whole chat"].outputs[0]
    choice = choice_of(client, **{field: field != "skip_special_tokens"})
    assert choice["message"] == expected.message
    assert choice.get("token_ids", expected.token_ids) == expected.token_ids
