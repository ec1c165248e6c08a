"""`/v1/messages` with Anthropic's own client, and what goes over the wire."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest

from jaxserve import RequestOutput
from jaxserve.server.protocol.messages import CountTokensRequest, MessagesRequest
from tests.server.cases import CONVERSATION, MODEL_NAME, TOOLS, WEATHER_ARGUMENTS, WEATHER_ASKED

SYSTEM, USER = CONVERSATION[0]["content"], CONVERSATION[1]
ASKED: dict[str, Any] = {"model": MODEL_NAME, "messages": [USER], "system": SYSTEM, "max_tokens": 200}
USED = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
ANTHROPIC_TOOLS = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (tool["function"] for tool in TOOLS)
]
WEATHER: dict[str, Any] = {"model": MODEL_NAME, "messages": [WEATHER_ASKED], "tools": ANTHROPIC_TOOLS}
WEATHER |= {"max_tokens": 200}


@pytest.fixture
async def async_sdk(server: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server, api_key="none", max_retries=0) as claude:
        yield claude


def blocks(message: anthropic.types.Message) -> list[dict[str, Any]]:
    """The blocks without the ids, which are each answer's own."""
    return [{key: value for key, value in block.to_dict().items() if key != "id"} for block in message.content]


def test_a_message_is_the_python_apis_answer(claude: anthropic.Anthropic, offline: dict[str, RequestOutput]) -> None:
    expected = offline["whole chat"]
    message = expected.outputs[0].message
    assert message
    answer = claude.messages.create(**ASKED)
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == ("assistant", "end_turn", None)
    thinking, text = answer.content
    assert (thinking.type, thinking.thinking) == ("thinking", message["reasoning_content"])
    assert (text.type, text.text) == ("text", message["content"])
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(expected.prompt_token_ids)
    assert usage.output_tokens == len(expected.outputs[0].token_ids)


def test_a_tool_is_used_and_its_result_answered(claude: anthropic.Anthropic, offline: dict[str, RequestOutput]) -> None:
    expected = offline["tools"].outputs[0].message
    assert expected
    answer = claude.messages.create(**WEATHER)
    assert answer.stop_reason == "tool_use"
    thinking, use = answer.content
    assert thinking.thinking == expected["reasoning_content"]
    assert (use.name, use.input) == ("get_weather", WEATHER_ARGUMENTS)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "weather sunny, event 12"}
    turns = [WEATHER_ASKED, answer.to_param(), {"role": "user", "content": [result]}]
    again = claude.messages.create(**WEATHER | {"messages": turns})
    assert again.content[-1].text == "The result is: weather sunny, event 12."


@pytest.mark.parametrize("asked", [ASKED, WEATHER, ASKED | {"max_tokens": 5}, ASKED | {"stop_sequences": ["ris"]}])
def test_a_stream_adds_up_to_the_whole(claude: anthropic.Anthropic, asked: dict[str, Any]) -> None:
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert blocks(final) == blocks(whole)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_streams_events_have_their_order(client: httpx.Client) -> None:
    response = client.post("/v1/messages", json=WEATHER | {"stream": True})
    assert response.status_code == 200
    named = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    told = [json.loads(data.removeprefix("data: ")) for _, data in named]
    assert [name for name, _ in named] == [f"event: {event['type']}" for event in told]
    assert told[0]["type"] == "message_start"
    assert told[0]["message"]["content"] == []
    assert told[0]["message"]["usage"]["output_tokens"] == 0
    assert [event["type"] for event in told[-2:]] == ["message_delta", "message_stop"]
    assert told[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    inner = told[1:-2]
    for index, kind, delta in ((0, "thinking", "thinking_delta"), (1, "tool_use", "input_json_delta")):
        start, *deltas, stop = [event for event in inner if event["index"] == index]
        assert (start["type"], start["content_block"]["type"]) == ("content_block_start", kind)
        assert {(event["type"], event["delta"]["type"]) for event in deltas} == {("content_block_delta", delta)}
        assert stop == {"type": "content_block_stop", "index": index}
    assert [event["index"] for event in inner] == sorted(event["index"] for event in inner)
    written = "".join(event["delta"].get("partial_json", "") for event in inner if "delta" in event)
    assert json.loads(written) == WEATHER_ARGUMENTS


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [({"max_tokens": 3}, "max_tokens", None), ({"stop_sequences": ["ris"]}, "stop_sequence", "ris")],
)
def test_the_reason_of_the_end_is_told(
    claude: anthropic.Anthropic, fields: dict[str, Any], reason: str, sequence: str | None
) -> None:
    answer = claude.messages.create(**ASKED | fields)
    assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)


def test_thinking_may_be_turned_off(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(**ASKED, thinking={"type": "disabled"})
    assert [block.type for block in answer.content] == ["text"]
    assert "Paris" in answer.content[0].text


def test_an_assistants_message_at_the_end_is_continued(claude: anthropic.Anthropic) -> None:
    begun = {"role": "assistant", "content": "The capital"}
    count = claude.messages.count_tokens(model=MODEL_NAME, messages=[USER, begun], system=SYSTEM)
    answer = claude.messages.create(**ASKED | {"messages": [USER, begun]})
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == count.input_tokens
    assert [block.type for block in answer.content] == ["text"]


def test_tokens_are_counted_as_they_are_used(claude: anthropic.Anthropic) -> None:
    asked = {key: WEATHER[key] for key in ("model", "messages", "tools")}
    counted = claude.messages.count_tokens(**asked, system=SYSTEM).input_tokens
    usage = claude.messages.create(**WEATHER, system=SYSTEM).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert counted > claude.messages.count_tokens(**asked | {"tools": []}, system=SYSTEM).input_tokens


@pytest.mark.anyio
async def test_asynchronous_streams_side_by_side(async_sdk: anthropic.AsyncAnthropic) -> None:
    whole = await async_sdk.messages.create(**ASKED)
    for _ in range(2):
        async with async_sdk.messages.stream(**ASKED) as stream:
            text = "".join([text async for text in stream.text_stream])
        assert text == whole.content[-1].text


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://localhost/a.png"}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 0}, ["max_tokens is 0"]),
        ({"stop_sequences": [""]}, ["stop_sequences holds ''"]),
        ({"n": 2}, ["no field 'n'"]),
        ({"messages": []}, ["messages is empty"]),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, ["messages[0].content", "'image'", "'tool_result'"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["messages[0].role", "'robot'"]),
        ({"thinking": {"type": "adaptive", "budget_tokens": 1024}}, ["thinking.budget_tokens", "'adaptive'"]),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, ["thinking.budget_tokens is -1"]),
        ({"output_config": {"format": {"type": "text"}}}, ["output_config.format.type", "'json_schema'"]),
        ({"output_config": {"effort": "high"}}, ["output_config.effort is 'high'"]),
        ({"tool_choice": {"type": "any"}}, ["tool_choice", "there are no tools"]),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, ["tools[0].input_schema", "'array'"]),
        ({"tools": [{"name": "", "input_schema": {}}]}, ["tools[0].name is ''"]),
        (
            {"messages": [*ASKED["messages"], {"role": "assistant", "content": [USED]}]},
            ["messages ends with a tool_use"],
        ),
        ({"chat_template_kwargs": {"tools": []}}, ["chat_template_kwargs has 'tools'"]),
        ({"chat_template_kwargs": {"documents": [{}]}}, ["chat_template_kwargs.documents is given"]),
        ({"tool_choice": {"type": "tool", "name": "f"}}, ["'f'", "not among the tools"]),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, ["tools[0].type", "bash_20250124"]),
        ({"container": "c"}, ["container", "not supported"]),
    ],
)
def test_what_cannot_be_served_is_refused_in_anthropics_shape(
    claude: anthropic.Anthropic, fields: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.post("/v1/messages", body=ASKED | fields, cast_to=httpx.Response)
    body = caught.value.body
    assert isinstance(body, dict)
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert [text for text in told if text not in body["error"]["message"]] == []


def test_a_model_that_is_not_here(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude'"):
        claude.messages.create(**ASKED | {"model": "claude"})


def test_fields_that_ask_for_nothing_are_let_through(client: httpx.Client) -> None:
    neutral = {name: values[0] if values else None for name, values in MessagesRequest.unsupported.items()}
    marked = {"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}
    extra = {"system": [marked], "thinking": {"type": "adaptive"}, "metadata": {"user_id": "me"}}
    assert client.post("/v1/messages", json=ASKED | neutral | extra).status_code == 200


def test_blocks_are_messages_of_a_chat() -> None:
    request = CountTokensRequest.model_validate(
        {
            "model": "m",
            "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": ""},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "And?"},
                        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "3"}]},
                        {"type": "tool_result", "tool_use_id": "d", "content": "none", "is_error": True},
                    ],
                },
            ],
        }
    )
    assert request.conversation == [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "tool", "tool_call_id": "d", "content": "Error: none"},
        {"role": "user", "content": "And?"},
    ]
