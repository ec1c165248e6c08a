"""`/v1/responses` with OpenAI's own client, and what goes over the wire."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from jaxserve import RequestOutput
from jaxserve.server.protocol.responses import ResponsesRequest, as_messages
from tests.server.cases import CONVERSATION, MODEL_NAME, TOOLS, WEATHER_ARGUMENTS, WEATHER_ASKED, error

FLAT_TOOLS = [{"type": "function", "strict": False} | tool["function"] for tool in TOOLS]
ASKED: dict[str, Any] = {"model": MODEL_NAME, "input": CONVERSATION, "temperature": 0}
WEATHER: dict[str, Any] = ASKED | {"input": WEATHER_ASKED["content"], "tools": FLAT_TOOLS}
CALLED: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f"}


@pytest.fixture
async def async_sdk(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def ids_apart(output: list[Any]) -> list[dict[str, Any]]:
    """Items without the ids, which are each answer's own."""
    return [{key: value for key, value in item.to_dict().items() if key not in ("id", "call_id")} for item in output]


def test_a_response_is_the_python_apis_answer(sdk: openai.OpenAI, offline: dict[str, RequestOutput]) -> None:
    expected = offline["whole chat"]
    message = expected.outputs[0].message
    assert message
    response = sdk.responses.create(**ASKED)
    assert response.status == "completed"
    assert response.output_text == message["content"]
    reasoning, answer = response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", message["reasoning_content"])
    assert (answer.type, answer.role, answer.status) == ("message", "assistant", "completed")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (
        len(expected.prompt_token_ids),
        len(expected.outputs[0].token_ids),
    )
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_string_is_the_users_message_and_instructions_come_first(sdk: openai.OpenAI) -> None:
    system, user = CONVERSATION
    asked = ASKED | {"input": user["content"], "instructions": system["content"]}
    response = sdk.responses.create(**asked)
    assert response.output_text == sdk.responses.create(**ASKED).output_text
    assert response.instructions == system["content"]


def test_an_answer_that_is_cut_is_incomplete(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(**ASKED, max_output_tokens=5)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"


@pytest.mark.parametrize("asked", [ASKED, WEATHER, ASKED | {"max_output_tokens": 5}])
def test_a_streams_events_build_the_response(sdk: openai.OpenAI, asked: dict[str, Any]) -> None:
    whole = sdk.responses.create(**asked)
    told = list(sdk.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert [event.type for event in told[:2]] == ["response.created", "response.in_progress"]
    assert told[-1].type == f"response.{whole.status}"
    final = told[-1].response
    assert ids_apart(final.output) == ids_apart(whole.output)
    # The first of them may find less of its prompt cached.
    usage = [each.usage.model_copy(update={"input_tokens_details": None}) for each in (final, whole)]
    assert (usage[0], final.status) == (usage[1], whole.status)
    for index, item in enumerate(final.output):
        added, *grown, done = [event for event in told[2:-1] if event.output_index == index]
        assert (added.type, done.type) == ("response.output_item.added", "response.output_item.done")
        assert added.item.id == done.item.id == item.id
        assert {event.item_id for event in grown} == {item.id}
        assert done.item == item
        pieces = "".join(event.delta for event in grown if event.type.endswith(".delta"))
        kinds = [event.type for event in grown if not event.type.endswith(".delta")]
        if item.type == "function_call":
            assert kinds == ["response.function_call_arguments.done"]
            assert pieces == item.arguments == grown[-1].arguments
        else:
            text = "reasoning_text" if item.type == "reasoning" else "output_text"
            assert kinds == [
                "response.content_part.added",
                f"response.{text}.done",
                "response.content_part.done",
            ]
            assert pieces == item.content[0].text


def test_the_streaming_helper_reads_it(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(**WEATHER) as stream:
        response = stream.get_final_response()
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert json.loads(call.arguments) == WEATHER_ARGUMENTS


def test_a_tools_result_is_answered(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(**WEATHER)
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "weather sunny, event 12"}
    kept = sdk.responses.create(**WEATHER | {"input": [result]}, previous_response_id=response.id)
    assert kept.output_text == "The result is: weather sunny, event 12."
    assert kept.previous_response_id == response.id
    sent = sdk.responses.create(**WEATHER | {"input": [WEATHER_ASKED, *response.output, result]}, store=False)
    assert ids_apart(sent.output) == ids_apart(kept.output)


def test_responses_are_kept_until_they_are_deleted(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(**ASKED, metadata={"purpose": "test"}, user="me")
    assert sdk.responses.retrieve(response.id) == response
    assert (response.metadata, response.user, response.store) == ({"purpose": "test"}, "me", True)
    sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        sdk.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.delete(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(**ASKED, previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"
    unkept = sdk.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(unkept.id)


@pytest.mark.anyio
async def test_asynchronous_streams_side_by_side(async_sdk: openai.AsyncOpenAI) -> None:
    whole = await async_sdk.responses.create(**ASKED)
    streams = [await async_sdk.responses.create(**ASKED, stream=True) for _ in range(3)]
    for stream in streams:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        assert text == whole.output_text


def test_events_are_named_and_the_last_one_ends_the_stream(client: httpx.Client) -> None:
    response = client.post("/v1/responses", json=ASKED | {"stream": True})
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    for event, data in blocks:
        assert event == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert blocks[-1][0] == "event: response.completed"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"max_tokens": 5}, "max_tokens", ["no field 'max_tokens'"]),
        ({"background": True}, "background", ["not supported"]),
        ({"truncation": "auto"}, "truncation", ["not supported"]),
        ({"text": {"verbosity": "low"}}, "text.verbosity", ["not supported"]),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", ["'web_search'", "'function'"]),
        ({"tools": [FLAT_TOOLS[0] | {"strict": "yes"}]}, "tools[0].strict", ["strict"]),
        ({"tool_choice": "required"}, "tool_choice", ["there are no tools"]),
        ({"tool_choice": "always"}, "tool_choice", ["'always'", "'required'", "{'type': 'function', 'name': ...}"]),
        ({"tools": [FLAT_TOOLS[0] | {"name": ""}]}, "tools[0].name", ["tools[0].name is ''"]),
        (
            {"tools": [FLAT_TOOLS[0] | {"parameters": {"type": "array"}}]},
            "tools",
            ["tools[0].parameters is of type 'array'"],
        ),
        ({"input": [CALLED | {"arguments": "{"}]}, "input[0].arguments", ["input[0].arguments is '{'"]),
        ({"input": "x " * 5000}, "input", ["the prompt has 10"]),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", ["chat_template_kwargs has 'messages'"]),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", ["chat_template_kwargs has 'self'"]),
        (
            {"chat_template_kwargs": {"reasoning_effort": "low"}},
            "chat_template_kwargs.reasoning_effort",
            ["chat_template_kwargs.reasoning_effort is 'low'"],
        ),
        ({"tool_choice": 5}, "tool_choice", ["tool_choice"]),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", ["'file_search'"]),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", ["'f'", "not among the tools"]),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input", ["input[0] is of type 'item_reference'"]),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None, ["'input_image'"]),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", ["reasoning.effort is 'low'"]),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", ["not supported"]),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", ["include[0]"]),
        ({"top_logprobs": 2}, "top_logprobs", ["not supported"]),
        ({"input": []}, "input", ["input is empty"]),
        ({"temperature": 101}, "temperature", ["temperature"]),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], param: str | None, told: list[str]
) -> None:
    found = error(client.post("/v1/responses", json=ASKED | fields), 400)
    assert [text for text in told if text not in found["message"]] == []
    if param:
        assert found["param"] == param


def test_fields_that_ask_for_nothing_are_let_through(client: httpx.Client) -> None:
    neutral = {name: values[0] if values else None for name, values in ResponsesRequest.unsupported.items()}
    extra = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}, "max_output_tokens": 1}
    extra |= {"text": {"format": {"type": "text"}, "verbosity": "medium"}}
    assert client.post("/v1/responses", json=ASKED | neutral | extra).status_code == 200


def test_items_are_messages_of_a_chat() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    said |= {"content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]}
    called = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        *[thought, said, called, called | {"call_id": "d"}],
        {"type": "function_call_output", "call_id": "c", "output": "3"},
        {"role": "assistant", "content": "So."},
        {"role": "assistant", "content": "And so."},
    ]
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in "cd"]
    assert as_messages(ResponsesRequest.model_validate({"input": items}).input) == [
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": "So."},
        {"role": "assistant", "content": "And so."},
    ]
