"""What cannot be served is answered with a status and a sentence that names it, and nothing else happens."""

import dataclasses
import json
from typing import Any

import httpx
import pytest

from jaxserve import SamplingParams
from jaxserve.server.protocol.base import RequestType
from jaxserve.server.protocol.chat import ChatCompletionRequest, Message
from jaxserve.server.protocol.completions import CompletionRequest
from jaxserve.server.protocol.messages import MessagesRequest
from jaxserve.server.protocol.responses import ResponsesRequest
from tests.server.cases import MODEL_NAME, error, events

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 1},
    CHAT: {"messages": [USER], "max_tokens": 1},
}


def refused(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    return error(client.post(path, json=GOOD[path] | fields), 400)


@pytest.mark.parametrize("path", GOOD)
def test_a_field_that_does_not_exist(client: httpx.Client, path: str) -> None:
    found = refused(client, path, temprature=1)
    assert found["param"] == "temprature"
    assert found["message"] == "there is no field 'temprature'; did you mean 'temperature'?"
    nested = refused(client, path, stream=True, stream_options={"include_costs": True})
    assert nested["param"] == "stream_options.include_costs"
    assert "include_costs" in nested["message"]


UNSUPPORTED = [(COMPLETIONS, name) for name in CompletionRequest.unsupported]
UNSUPPORTED += [(CHAT, name) for name in ChatCompletionRequest.unsupported]


@pytest.mark.parametrize(("path", "name"), UNSUPPORTED)
def test_a_field_of_openai_that_is_not_supported(client: httpx.Client, path: str, name: str) -> None:
    found = refused(client, path, **{name: "something"})
    assert found["param"] == name
    assert name in found["message"]
    assert "not supported" in found["message"]


@pytest.mark.parametrize(("path", "request_type"), [(COMPLETIONS, CompletionRequest), (CHAT, ChatCompletionRequest)])
def test_fields_that_ask_for_nothing_are_let_through(client: httpx.Client, path: str, request_type: Any) -> None:
    neutral = {name: values[0] if values else None for name, values in request_type.unsupported.items()}
    assert neutral
    assert client.post(path, json=GOOD[path] | neutral).status_code == 200
    nulls = dict.fromkeys(request_type.unsupported)
    assert client.post(path, json=GOOD[path] | nulls).status_code == 200


def test_messages_that_ask_for_nothing_more_are_let_through(client: httpx.Client) -> None:
    neutral = {name: values[0] if values else None for name, values in Message.unsupported.items()}
    answered = {"role": "assistant", "content": "Hi"} | neutral
    assert client.post(CHAT, json=GOOD[CHAT] | {"messages": [USER, answered, USER]}).status_code == 200


# What a request says, the field that the error is about, and what its sentence has to tell.
COMMON: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"temperature": "hot"}, "temperature", ["temperature", "'hot'", "number"]),
    ({"temperature": 101}, "temperature", ["temperature", "101", "between 0 and 100"]),
    ({"temperature": -1}, "temperature", ["temperature", "-1"]),
    ({"top_p": 0}, "top_p", ["top_p", "above 0 and at most 1"]),
    ({"top_k": -2}, "top_k", ["top_k", "-2"]),
    ({"min_p": 1.5}, "min_p", ["min_p", "1.5"]),
    ({"repetition_penalty": 0}, "repetition_penalty", ["repetition_penalty", "above 0"]),
    ({"presence_penalty": 2.5}, "presence_penalty", ["presence_penalty", "2.5"]),
    ({"frequency_penalty": -2.5}, "frequency_penalty", ["frequency_penalty", "-2.5"]),
    ({"n": 0}, "n", ["n is 0"]),
    ({"n": 2.5}, "n", ["n is 2.5", "integer"]),
    ({"n": "2"}, "n", ["n is '2'", "integer"]),
    ({"n": True}, "n", ["n is True", "integer"]),
    ({"max_tokens": 0}, "max_tokens", ["max_tokens", "0"]),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", ["min_tokens=5", "max_tokens=4"]),
    ({"stop": [""]}, "stop", ["stop", "non-empty"]),
    ({"stop": [1]}, "stop[0]", ["stop[0]", "string"]),
    ({"stop_token_ids": [10**9]}, "stop_token_ids", ["stop_token_ids", "1000000000"]),
    ({"logit_bias": {"one": 1}}, "logit_bias", ["logit_bias", "token id"]),
    ({"logit_bias": {"1": 101}}, "logit_bias", ["logit_bias[1]", "101"]),
    ({"logit_bias": {"1000000000": 1}}, "logit_bias", ["logit_bias", "1000000000"]),
    ({"seed": 2**70}, "seed", ["seed"]),
    ({"temperature": 10**400}, "temperature", ["temperature", "number"]),
    ({"n": 10**4000}, "n", ["n is 1000"]),
    ({"prompt_logprobs": 21}, "prompt_logprobs", ["prompt_logprobs", "21", "max_logprobs=20"]),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ["prompt_logprobs", "stream"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["stream_options", "stream=true"]),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
        ["continuous_usage_stats", "include_usage=true"],
    ),
    ({"allowed_token_ids": []}, "allowed_token_ids", ["allowed_token_ids is empty"]),
    ({"allowed_token_ids": [10**9]}, "allowed_token_ids", ["allowed_token_ids", "1000000000"]),
    (
        {"allowed_token_ids": [1273], "min_tokens": 2, "max_tokens": 5},
        "allowed_token_ids",
        ["allowed_token_ids", "min_tokens=2"],
    ),
    ({"priority": "high"}, "priority", ["priority", "'high'"]),
]


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(("fields", "param", "told"), COMMON)
def test_values_that_no_endpoint_takes(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str, told: list[str]
) -> None:
    found = refused(client, path, **fields)
    assert found["param"] == param
    assert [text for text in told if text not in found["message"]] == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": 5}, ["prompt is none of"]),
        ({"prompt": []}, ["prompt is none of"]),
        ({"prompt": ["a", 5]}, ["prompt is none of"]),
        ({"prompt": ""}, ["prompt is empty"]),
        ({"prompt": None}, ["prompt is none of"]),
        ({"prompt": [10**9]}, ["1000000000"]),
        ({"prompt": [-1], "echo": True}, ["-1"]),
        ({"best_of": 2}, ["best_of is 2", "n is 1"]),
        ({"logprobs": 21}, ["logprobs is 21", "max_logprobs=20"]),
        ({"logprobs": -1}, ["logprobs is -1", "between 0"]),
        ({"max_tokens": 0}, ["max_tokens is 0"]),
        ({"truncate_prompt_tokens": 0}, ["truncate_prompt_tokens is 0", "give -1 or"]),
        ({"truncate_prompt_tokens": -2}, ["truncate_prompt_tokens is -2"]),
        ({"request_id": ""}, ["request_id is ''"]),
        ({"cache_salt": ""}, ["cache_salt is ''"]),
        ({"return_tokens_as_token_ids": 1}, ["return_tokens_as_token_ids is 1"]),
        ({"logprobs": True}, ["logprobs is True"]),
        ({"messages": []}, ["'messages'"]),
    ],
)
def test_values_that_completions_do_not_take(client: httpx.Client, fields: dict[str, Any], told: list[str]) -> None:
    message = refused(client, COMPLETIONS, **fields)["message"]
    assert [text for text in told if text not in message] == []


@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        (COMPLETIONS, {"prompt": [10**9]}, "prompt", "prompt holds 1000000000;"),
        (COMPLETIONS, {"prompt": [5] * 512}, "prompt", "the prompt has 512 tokens"),
        (CHAT, {"messages": [USER | {"content": "Hello " * 600}]}, "messages", "the prompt has 1208 tokens"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs", "logprobs is 21,"),
        ("/v1/embeddings", {"input": [-1]}, "input", "input holds -1;"),
        (CHAT, {"messages": [USER], "max_tokens": 0}, "max_tokens", "max_tokens is 0;"),
        (
            CHAT,
            {"messages": [USER], "max_completion_tokens": 0},
            "max_completion_tokens",
            "max_completion_tokens is 0;",
        ),
        (
            CHAT,
            {"messages": [USER], "max_completion_tokens": 4, "min_tokens": 5},
            "min_tokens",
            "min_tokens=5 is more than max_completion_tokens=4;",
        ),
        (CHAT, {"messages": []}, "messages", "messages is empty;"),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21,"),
        (CHAT, {"messages": [USER], "reasoning_effort": "low"}, "reasoning_effort", "reasoning_effort is 'low',"),
        ("/v1/responses", {"input": []}, "input", "input is empty;"),
        ("/v1/responses", {}, "input", "input is empty;"),
        ("/v1/responses", {"input": "x", "max_output_tokens": -1}, "max_output_tokens", "max_output_tokens is -1;"),
        (
            "/v1/responses",
            {"input": "x", "max_output_tokens": 4, "min_tokens": 5},
            "min_tokens",
            "min_tokens=5 is more than max_output_tokens=4;",
        ),
        ("/v1/responses", {"input": "x", "temperature": 101}, "temperature", "temperature is 101"),
        (
            "/v1/responses",
            {"input": "x", "reasoning": {"effort": "low"}},
            "reasoning.effort",
            "reasoning.effort is 'low',",
        ),
    ],
)
def test_the_field_is_told_by_the_clients_name(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    found = error(client.post(path, json=fields), 400)
    assert found["param"] == param
    assert found["message"].startswith(said)


def test_a_refusal_of_no_field_names_none(client: httpx.Client) -> None:
    found = refused(client, COMPLETIONS, prompt=["Hello"] * 3, n=1024)
    assert "3072 completions" in found["message"]
    assert found["param"] is None


# Each API's request, a body of it, and the numbers of `SamplingParams` that it has by another name.
APIS: dict[str, tuple[type[RequestType], dict[str, Any], dict[str, str]]] = {
    COMPLETIONS: (CompletionRequest, {"prompt": "Hello"}, {}),
    CHAT: (ChatCompletionRequest, {"messages": [USER], "logprobs": True}, {"logprobs": "top_logprobs"}),
    "/v1/responses": (ResponsesRequest, {"input": "Hello"}, {"max_tokens": "max_output_tokens"}),
    "/v1/messages": (
        MessagesRequest,
        {"model": MODEL_NAME, "messages": [USER], "max_tokens": 1},
        {"thinking_token_budget": "thinking.budget_tokens"},
    ),
}
NUMBERS = [field.name for field in dataclasses.fields(SamplingParams) if field.type in (int, float, int | None)]
SPELLED = [
    (path, name, spelled)
    for path, (request_type, _, others) in APIS.items()
    for name in NUMBERS
    if (spelled := others.get(name, name)).split(".")[0] in request_type.model_fields
]
SPELLED.append((CHAT, "max_tokens", "max_completion_tokens"))


def test_every_number_is_some_apis() -> None:
    assert {name for _, name, _ in SPELLED} == {*NUMBERS}


@pytest.mark.parametrize(("path", "name", "spelled"), SPELLED)
def test_every_number_is_refused_by_the_clients_name(client: httpx.Client, path: str, name: str, spelled: str) -> None:
    outer, _, inner = spelled.partition(".")
    given = {outer: {"type": "enabled", inner: 2**70} if inner else 2**70}
    answer = client.post(path, json=APIS[path][1] | given)
    assert answer.status_code == 400
    found = answer.json()["error"]
    assert found["message"].startswith(f"{spelled} is 1")  # 1180591620717411303424, or 1.18...e+21
    if path != "/v1/messages":  # Anthropic's errors have no such place
        assert found["param"] == spelled


def test_best_of_n_is_n(client: httpx.Client) -> None:
    assert client.post(COMPLETIONS, json=GOOD[COMPLETIONS] | {"best_of": 2, "n": 2}).status_code == 200


IMAGE = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": []}, ["messages is empty"]),
        ({"messages": "Hello"}, ["messages is 'Hello'"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["messages[0].role", "'robot'", "'user'"]),
        ({"messages": [USER, {"role": "user"}]}, ["messages[1].content is missing"]),
        ({"messages": [{"content": "x"}]}, ["messages[0].role is missing"]),
        ({"messages": [USER | {"content": 5}]}, ["messages[0].content is 5"]),
        ({"messages": [USER | {"content": [IMAGE]}]}, ["messages[0].content", "'image_url'", "not supported"]),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, ["messages[0].content", "'text'"]),
        ({"messages": [USER | {"content": ["x"]}]}, ["messages[0].content", "part"]),
        ({"messages": [USER | {"mood": "good"}]}, ["messages[0].mood"]),
        ({"messages": [USER | {"audio": {"id": "1"}}]}, ["messages[0].audio", "not supported"]),
        ({"messages": [USER | {"tool_call_id": "1"}]}, ["messages[0].tool_call_id", "'user'"]),
        ({"messages": [CALLED]}, ["messages[0].tool_calls[0].function.arguments", "JSON"]),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, ["messages[0].tool_calls", "'user'"]),
        ({"max_completion_tokens": 5}, ["max_tokens", "max_completion_tokens"]),
        ({"logprobs": 2}, ["logprobs is 2"]),
        ({"top_logprobs": 2}, ["top_logprobs", "logprobs=true"]),
        ({"top_logprobs": 21, "logprobs": True}, ["top_logprobs is 21", "max_logprobs=20"]),
        ({"top_logprobs": -1, "logprobs": True}, ["top_logprobs is -1"]),
        ({"tools": [{"type": "web_search"}]}, ["tools", "'web_search'"]),
        ({"chat_template_kwargs": {"tools": []}}, ["chat_template_kwargs", "'tools'"]),
        ({"chat_template_kwargs": {"enable_thinkin": 1}}, ["chat_template_kwargs", "did you mean 'enable_thinking'"]),
        ({"tools": [{"type": "function", "function": {}}]}, ["tools[0] is no function with a name"]),
        ({"tools": [TOOL], "tool_choice": {**NAMED, "function": {"name": "f"}}}, ["tool_choice names 'f'"]),
        ({"tool_choice": "required"}, ["tool_choice", "there are no tools"]),
        ({"tool_choice": "always"}, ["tool_choice is 'always'", "'required'"]),
        ({"reasoning_effort": "low"}, ["reasoning_effort is 'low'", "give 'none'"]),
        ({"reasoning_effort": "huge"}, ["reasoning_effort is 'huge'"]),
        ({"documents": [{"text": "x"}]}, ["documents", "template"]),
        ({"continue_final_message": True, "add_generation_prompt": True}, ["continue_final_message", "both"]),
        ({"messages": [USER | {"reasoning_content": "x"}]}, ["messages[0].reasoning_content", "'user'"]),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, ["chat_template_kwargs", "'chat_template'"]),
        ({"chat_template_kwargs": {"tokenize": True}}, ["chat_template_kwargs", "'tokenize'"]),
        ({"prompt": "Hello"}, ["'prompt'"]),
    ],
)
def test_values_that_chat_does_not_take(client: httpx.Client, fields: dict[str, Any], told: list[str]) -> None:
    message = refused(client, CHAT, **fields)["message"]
    assert [text for text in told if text not in message] == []


@pytest.mark.parametrize("path", GOOD)
def test_a_body_that_is_no_request(client: httpx.Client, path: str) -> None:
    for body in (b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'):
        assert error(client.post(path, content=body), 400)["message"].startswith("the body is not JSON")
    assert error(client.post(path, content=b"[1]"), 400)["message"] == "the body is [1]; give an object"
    missing = "prompt" if path == COMPLETIONS else "messages"
    assert error(client.post(path, json={}), 400)["message"] == f"{missing} is missing; give it"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(client: httpx.Client, stream: bool) -> None:
    assert client.post(COMPLETIONS, json={"prompt": [5] * 511, "stream": stream}).status_code == 200
    message = refused(client, COMPLETIONS, prompt=[5] * 512, stream=stream)["message"]
    assert "512 tokens" in message
    assert "max_model_len is 512" in message
    message = refused(client, CHAT, messages=[USER | {"content": "Hello " * 600}], stream=stream)["message"]
    assert "max_model_len is 512" in message


@pytest.mark.parametrize("path", GOOD)
def test_a_model_that_is_not_here(client: httpx.Client, path: str) -> None:
    found = error(client.post(path, json=GOOD[path] | {"model": "gpt-4"}), 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert "'gpt-4'" in found["message"]
    assert MODEL_NAME in found["message"]
    assert client.post(path, json=GOOD[path] | {"model": MODEL_NAME}).status_code == 200


def test_a_path_that_is_not_here(client: httpx.Client) -> None:
    assert "/v1/complete" in error(client.post("/v1/complete", json={}), 404)["message"]
    wrong_method = client.get(COMPLETIONS)
    assert "use POST" in error(wrong_method, 405)["message"]
    assert wrong_method.headers["allow"] == "POST"


def test_a_refusal_disturbs_no_neighbour(client: httpx.Client) -> None:
    asked = {"prompt": "Hello", "temperature": 1, "seed": 4, "max_tokens": 200, "ignore_eos": True, "stream": True}

    def text(response: httpx.Response) -> str:
        return "".join(chunk["choices"][0]["text"] for chunk in events(response))

    undisturbed = text(client.post(COMPLETIONS, json=asked))
    with client.stream("POST", COMPLETIONS, json=asked) as response:
        for _ in range(5):
            refused(client, COMPLETIONS, prompt=["Hello", [10**9], "Hello"])
            refused(client, COMPLETIONS, prompt=[[5] * 600, "Hello"], n=3)
        response.read()
    assert text(response) == undisturbed
    assert json.loads(response.text.split("\n\n")[0].removeprefix("data: "))["choices"][0]["finish_reason"] is None
