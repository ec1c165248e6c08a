"""Requests as types: every field goes where it belongs."""

import dataclasses
import json
from typing import Any

import pytest

from jaxserve import SamplingParams
from jaxserve.server.protocol.chat import ChatCompletionRequest
from jaxserve.server.protocol.completions import CompletionRequest

# Each field with a value other than its default, as JSON has it and as `SamplingParams` does.
FIELDS: dict[str, tuple[Any, Any]] = {
    "n": (3, 3),
    "temperature": (0.5, 0.5),
    "top_p": (0.5, 0.5),
    "top_k": (5, 5),
    "min_p": (0.1, 0.1),
    "repetition_penalty": (1.5, 1.5),
    "presence_penalty": (1, 1.0),
    "frequency_penalty": (-1.5, -1.5),
    "logit_bias": ({"17": -3, "18": 2.5}, {17: -3.0, 18: 2.5}),
    "allowed_token_ids": ([3, 4], (3, 4)),
    "seed": (11, 11),
    "max_tokens": (9, 9),
    "min_tokens": (4, 4),
    "stop": ("end", ("end",)),
    "stop_token_ids": ([3, 4], (3, 4)),
    "ignore_eos": (True, True),
    "include_stop_str_in_output": (True, True),
    "skip_special_tokens": (False, False),
    "prompt_logprobs": (2, 2),
}


def completion_params(**fields: Any) -> SamplingParams:
    request = CompletionRequest.model_validate_json(json.dumps({"prompt": "x"} | fields))
    return SamplingParams(**request.sampling_settings())


def chat_params(**fields: Any) -> SamplingParams:
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    return SamplingParams(**ChatCompletionRequest.model_validate_json(json.dumps(body)).sampling_settings())


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("parse", [completion_params, chat_params])
def test_sampling_fields_mean_what_they_mean_to_sampling_params(parse: Any, field: str) -> None:
    given, expected = FIELDS[field]
    assert getattr(SamplingParams(), field) != expected
    assert parse(**{field: given}) == dataclasses.replace(parse(), **{field: expected})


@pytest.mark.parametrize("parse", [completion_params, chat_params])
def test_null_is_as_good_as_leaving_out(parse: Any) -> None:
    assert parse(**dict.fromkeys(FIELDS)) == parse()


def test_no_sampling_field_is_forgotten() -> None:
    # The one of another meaning in each endpoint, and those that are Python's alone.
    own = {
        "logprobs",
        "detokenize",
        "structured_outputs",
        "thinking",
        "thinking_token_budget",
        "chat_grammar",
        "pooling",
    }
    assert {field.name for field in dataclasses.fields(SamplingParams)} == FIELDS.keys() | own


def test_completions_generate_16_tokens_unless_told_and_chat_goes_on() -> None:
    assert completion_params().max_tokens == 16
    assert chat_params().max_tokens is None
    assert chat_params(max_completion_tokens=5).max_tokens == 5


def test_logprobs_are_a_number_in_completions_and_a_choice_in_chat() -> None:
    assert completion_params(logprobs=3).logprobs == 3
    assert completion_params().logprobs is None
    assert chat_params(logprobs=True).logprobs == 0
    assert chat_params(logprobs=True, top_logprobs=4).logprobs == 4
    assert chat_params(logprobs=False).logprobs is None


def test_an_echo_with_logprobs_needs_those_of_the_prompt() -> None:
    assert completion_params(echo=True, logprobs=3).prompt_logprobs == 3
    assert completion_params(echo=True, logprobs=3, prompt_logprobs=5).prompt_logprobs == 5
    assert completion_params(echo=True).prompt_logprobs is None


def test_text_parts_of_messages_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].content == "one\ntwo"


def test_what_litellm_notes_on_an_answer_is_nothing_to_the_model() -> None:
    answer = {"role": "assistant", "content": "Paris."}
    noted = answer | {"provider_specific_fields": {"refusal": None, "reasoning_content": "A fact."}}
    (message,) = ChatCompletionRequest(messages=[noted]).messages
    assert message.model_dump(exclude_none=True) == answer
