"""Every sampling parameter out of range is refused by name, with what is allowed."""

import dataclasses
import math

import pytest

from jaxserve import InputError, SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n is 0; give an integer between 1 and"),
        ({"temperature": -0.1}, "temperature is -0.1; give a number between 0 and 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0; give a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -2}, "top_k is -2; give an integer 0 or -1 to keep all tokens"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; give a number between -2 and 2"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; give an integer"),
        ({"max_tokens": True}, "max_tokens is True; give an integer"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": ["a"], "detokenize": False}, "detokenize is False"),
        ({"stop_token_ids": [-3]}, "stop_token_ids holds -3"),
        ({"logit_bias": {3: 101}}, r"logit_bias\[3\] is 101"),
        ({"logit_bias": {"a": 1}}, "logit_bias holds 'a'"),
        ({"logit_bias": [1]}, "logit_bias is a list"),
        ({"temprature": 1}, "no field 'temprature'; did you mean 'temperature'"),
    ],
)
def test_out_of_range_is_refused_in_one_sentence(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        SamplingParams(**settings)
    assert "\n" not in str(caught.value)
    assert caught.value.field == next(iter(settings))


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(SamplingParams) if field.type in (int, float, int | None)]
)
def test_every_number_is_refused_by_its_field(name):
    with pytest.raises(InputError, match=f"^{name} is 1180591620717411303424;") as caught:
        SamplingParams(**{name: 2**70})
    assert caught.value.field == name


def test_spellings_that_mean_the_same_are_equal():
    assert SamplingParams(stop="x", top_k=-1) == SamplingParams(stop=["x"], top_k=0)
