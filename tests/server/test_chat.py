"""`/v1/chat/completions` on a real engine."""

from collections import defaultdict
from typing import Any

import httpx
import pytest

from jaxserve import LLM, RequestOutput
from tests.server.cases import CONVERSATION, MODEL_NAME, events, message_of

GREEDY = {"temperature": 0, "max_tokens": 20}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}


def chat(client: httpx.Client, messages: Any = CONVERSATION, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": messages} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(client: httpx.Client, messages: Any = CONVERSATION, **fields: Any) -> list[int]:
    """The tokens that the server makes of a conversation."""
    return chat(client, messages, return_token_ids=True, max_tokens=1, **fields)["prompt_token_ids"]


def test_the_answer_is_that_of_the_python_api(client: httpx.Client, offline: dict[str, RequestOutput]) -> None:
    expected = offline["chat"]
    answer = chat(client, return_token_ids=True, **GREEDY)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    (output,) = expected.outputs
    assert answer == {
        "object": "chat.completion",
        "model": MODEL_NAME,
        "choices": [
            {
                "index": 0,
                "message": output.message,
                "logprobs": None,
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                "token_ids": output.token_ids,
            }
        ],
        "usage": {
            "prompt_tokens": len(expected.prompt_token_ids),
            "completion_tokens": len(output.token_ids),
            "total_tokens": len(expected.prompt_token_ids) + len(output.token_ids),
        },
        "prompt_token_ids": expected.prompt_token_ids,
    }


def test_a_stream_adds_up_to_the_whole(client: httpx.Client) -> None:
    fields = {"temperature": 5, "seed": 5, "max_tokens": 20, "n": 3, "logprobs": True, "top_logprobs": 2}
    fields |= {"return_token_ids": True}
    whole = chat(client, **fields)
    asked = {"messages": CONVERSATION, "stream": True, "stream_options": {"include_usage": True}} | fields
    *chunks, last = events(client.post("/v1/chat/completions", json=asked))
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [whole["prompt_token_ids"]]
    by_index = defaultdict(list)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append(choice)
    assert [choice["index"] for choice in whole["choices"]] == sorted(by_index) == [0, 1, 2]
    assert len({str(choice["message"]) for choice in whole["choices"]}) == 3
    for choice in whole["choices"]:
        first, *parts = by_index[choice["index"]]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert message_of(chunks, choice["index"]) == choice["message"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        logprobs = [entry for part in parts for entry in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        reasons = [part["finish_reason"] for part in [first, *parts]]
        assert reasons == [None] * len(parts) + [choice["finish_reason"]]


def test_a_stream_without_usage_has_none(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"messages": CONVERSATION, "stream": True} | GREEDY)
    assert not any("usage" in chunk for chunk in events(response))


def test_logprobs_are_those_of_each_token(client: httpx.Client) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3, return_token_ids=True, **GREEDY)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == len(choice["token_ids"])
    for entry in content:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["bytes"] in (list(entry["token"].encode()), None)
        assert [top.keys() for top in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 3
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == sorted(tops, reverse=True)
        assert entry["logprob"] == tops[0]  # it is greedy
    assert any(entry["bytes"] for entry in content)
    (bare,) = chat(client, logprobs=True, **GREEDY)["choices"]
    assert [entry["logprob"] for entry in bare["logprobs"]["content"]] == [entry["logprob"] for entry in content]
    assert all(entry["top_logprobs"] == [] for entry in bare["logprobs"]["content"])


def test_prompt_logprobs_are_the_requests_own(client: httpx.Client) -> None:
    answer = chat(client, prompt_logprobs=1, return_token_ids=True, max_tokens=1)
    positions = answer["prompt_logprobs"]
    assert positions[0] is None
    for token, position in zip(answer["prompt_token_ids"][1:], positions[1:], strict=True):
        assert str(token) in position


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_may_be_limited(client: httpx.Client, name: str) -> None:
    answer = chat(client, ignore_eos=True, **{name: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_without_a_limit_an_answer_goes_on_to_the_models_length(client: httpx.Client) -> None:
    answer = chat(client, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_text_parts_are_joined(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = prompt_of(client, [{"role": "user", "content": "one\ntwo"}])
    assert prompt_of(client, [{"role": "user", "content": parts}]) == joined


def test_the_template_gets_what_the_request_has_for_it(client: httpx.Client, llm: LLM) -> None:
    def rendered(messages: Any = CONVERSATION, **arguments: Any) -> list[int]:
        return llm.engine.inputs.render_chat(messages, **arguments)

    plain = rendered()
    for arguments in ({"tools": [TOOL]}, {"add_generation_prompt": False}):
        assert prompt_of(client, **arguments) == rendered(**arguments) != plain
    thinking = {"enable_thinking": False}
    assert prompt_of(client, chat_template_kwargs=thinking) == rendered(**thinking) != plain
    turns = [
        {"role": "user", "content": "What is 2+3?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    assert prompt_of(client, turns, tools=[TOOL]) == rendered(turns, tools=[TOOL])
    assert prompt_of(client, tools=[TOOL], tool_choice="none") == plain
    assert prompt_of(client, reasoning_effort="none") == rendered(**thinking)
    assert prompt_of(client, add_special_tokens=True) == rendered(add_special_tokens=True)


def test_a_developer_is_the_system(client: httpx.Client) -> None:
    _, user = CONVERSATION
    system, developer = ([{"role": role, "content": "Be brief."}, user] for role in ("system", "developer"))
    assert prompt_of(client, developer) == prompt_of(client, system) != prompt_of(client, [user])


def test_an_answer_is_continued_and_may_be_told_from_its_beginning(client: httpx.Client, llm: LLM) -> None:
    begun = [*CONVERSATION, {"role": "assistant", "content": "The capital"}]
    fields = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}} | GREEDY
    prompt = llm.engine.inputs.render_chat(begun, continue_final_message=True)
    assert llm.get_tokenizer().decode(prompt).endswith("The capital")
    answer = chat(client, begun, return_token_ids=True, **fields)
    assert answer["prompt_token_ids"] == prompt
    rest = answer["choices"][0]["message"]["content"]
    echoed = chat(client, begun, echo=True, **fields)["choices"][0]["message"]["content"]
    assert echoed == "The capital" + rest
    asked = {"messages": begun, "echo": True, "stream": True} | fields
    assert message_of(events(client.post("/v1/chat/completions", json=asked)))["content"] == echoed
    assert chat(client, echo=True, **GREEDY) | {"id": 0, "created": 0} == chat(client, **GREEDY) | {
        "id": 0,
        "created": 0,
    }
