"""OpenAI's own client, synchronous and asynchronous."""

from collections.abc import AsyncIterator

import openai
import pytest

from jaxserve import RequestOutput
from tests.server.cases import COMPLETIONS, CONVERSATION, MODEL_NAME

PROMPT, SETTINGS = COMPLETIONS["greedy"]
EXTRA = {"ignore_eos": True}


@pytest.fixture
async def async_sdk(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def test_models(sdk: openai.OpenAI) -> None:
    assert [(model.id, model.owned_by) for model in sdk.models.list()] == [(MODEL_NAME, "jaxserve")]


def test_a_completion(sdk: openai.OpenAI, offline: dict[str, RequestOutput]) -> None:
    asked = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "extra_body": EXTRA}
    (expected,) = offline["greedy"].outputs
    completion = sdk.completions.create(**asked)
    assert completion.choices[0].text == expected.text
    assert completion.usage.completion_tokens == 24
    *chunks, last = sdk.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert last.usage == completion.usage


def test_a_chat(sdk: openai.OpenAI, offline: dict[str, RequestOutput]) -> None:
    asked = {"model": MODEL_NAME, "messages": CONVERSATION, "max_completion_tokens": 20, "logprobs": True}
    (expected,) = offline["chat"].outputs
    completion = sdk.chat.completions.create(**asked, top_logprobs=2)
    (choice,) = completion.choices
    assert choice.message.to_dict() == expected.message
    assert len(choice.logprobs.content) == completion.usage.completion_tokens == len(expected.token_ids)
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    again = [*CONVERSATION, choice.message, {"role": "user", "content": "Thanks"}]
    assert sdk.chat.completions.create(**asked | {"messages": again}).choices


def test_the_streaming_helper(sdk: openai.OpenAI, offline: dict[str, RequestOutput]) -> None:
    (expected,) = offline["chat"].outputs
    answer = expected.message["content"]
    stop = answer[4:8]
    asked = {"model": MODEL_NAME, "messages": CONVERSATION, "stop": stop, "stream_options": {"include_usage": True}}
    with sdk.chat.completions.stream(**asked) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == answer[: answer.index(stop)]
    assert completion.choices[0].finish_reason == "stop"
    assert 0 < completion.usage.completion_tokens <= len(expected.token_ids)


def test_errors(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        sdk.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        sdk.completions.create(model=MODEL_NAME, prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError, match="max_model_len is 512"):
        sdk.completions.create(model=MODEL_NAME, prompt=[5] * 600, stream=True)


@pytest.mark.anyio
async def test_asynchronous_calls_side_by_side(
    async_sdk: openai.AsyncOpenAI, offline: dict[str, RequestOutput]
) -> None:
    (expected,) = offline["chat"].outputs
    asked = {"model": MODEL_NAME, "messages": CONVERSATION, "max_completion_tokens": 20}
    streams = [await async_sdk.chat.completions.create(**asked, stream=True) for _ in range(6)]
    for stream in streams:
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == expected.message["content"]
    completion = await async_sdk.chat.completions.create(**asked)
    assert completion.choices[0].message.content == expected.message["content"]
