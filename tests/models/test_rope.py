"""Rotary embeddings of every kind, against `transformers`' frequencies and complex arithmetic."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import InputError
from jaxserve.layers.rotary import (
    ROPE_KINDS,
    RopeConfig,
    apply_rope,
    attention_factor,
    inverse_frequencies,
    rope_tables,
    yarn_mscale,
)
from jaxserve.models.hf_config import rope_config
from jaxserve.models.registry import model_config
from tests.models.references import stored_rope
from tests.models.ropes import ROPES


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_attention_factors_are_those_of_transformers(name: str) -> None:
    case = ROPES[name]
    rope = rope_config(case.parameters, case.max_position_embeddings)
    rope = dataclasses.replace(rope, longest=case.longest)
    frequencies, factor = stored_rope(name)
    np.testing.assert_allclose(inverse_frequencies(rope, case.head_dim), frequencies, rtol=2e-6)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-6)


def test_every_kind_is_compared() -> None:
    assert {case.parameters["rope_type"] for case in ROPES.values()} | {"default"} == ROPE_KINDS.keys()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_multiplication_by_a_complex_number_of_each_pair(interleaved: bool) -> None:
    rope = RopeConfig(
        theta=100.0, partial_rotary_factor=0.5, kind="yarn", factor=4.0, original_max_position_embeddings=8
    )
    x = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float32)
    positions = np.array([0, 1, 7, 30, 1000])
    found = np.asarray(apply_rope(jnp.asarray(x), *rope_tables(positions, rope, 16), interleaved=interleaved))
    pairs = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., 0:4], x[..., 4:8])
    turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * positions[:, None, None] * inverse_frequencies(rope, 16))
    turned *= attention_factor(rope)
    at = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    np.testing.assert_allclose(found[..., at[0]], turned.real, atol=2e-4)
    np.testing.assert_allclose(found[..., at[1]], turned.imag, atol=2e-4)
    np.testing.assert_array_equal(found[..., 8:], x[..., 8:])


def test_yarn_sharpens_attention_as_its_paper_says() -> None:
    assert yarn_mscale(1.0) == yarn_mscale(0.5, 3.0) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.0707 * math.log(40.0) + 1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_what_depends_on_length_depends_on_the_longest_sequence_served_alone(kind: str) -> None:
    rope = RopeConfig(
        kind=kind, factor=4.0, original_max_position_embeddings=16, short_factor=(1,) * 4, long_factor=(3,) * 4
    )
    within, at, beyond = (inverse_frequencies(dataclasses.replace(rope, longest=n), 8) for n in (1, 16, 17))
    np.testing.assert_array_equal(within, at)
    assert (beyond[1:] < at[1:]).all()


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 4096),  # some configs have the length after it, some that before
        ({"rope_type": "dynamic", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_a_stretched_rope_reaches_beyond_the_length_that_it_starts_from(scaling: dict[str, Any], reach: int) -> None:
    from transformers import LlamaConfig

    hf = LlamaConfig(max_position_embeddings=4096, rope_scaling=scaling).to_dict()
    config = model_config(hf | {"architectures": ["LlamaForCausalLM"]})
    assert config.max_position_embeddings == reach
    assert {kind.rope.longest for kind in config.layer_kinds} == {reach}
    assert {kind.rope.longest for kind in config.served_up_to(100).layer_kinds} == {100}


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "sideways"}, "rope_type='sideways'"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "yarn", "factor": 16.0, "llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta"),
        ({"rope_type": "linear", "factor": "8"}, "factor='8'"),
        ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}, "short_factor=1.0"),
    ],
)
def test_unknown_parameters_are_refused_by_name(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named.replace("[", r"\[")):
        rope_config(parameters, 4096)
