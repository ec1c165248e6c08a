"""Weights in eight bits: how far each may be off, and that numpy and compiled programs round alike."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import Linear
from jaxserve.layers.quantisation import KINDS, rounded, scales
from pallas_kernels.matmul import matmul_nk


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    random = np.random.default_rng(draw(st.integers(0, 100)))
    size = 10.0 ** draw(st.integers(-6, 4))
    weight = (size * random.standard_t(2, (rows, columns))).astype(np.float32)
    weight[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from([0, 1]))
    return weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@given(weight=weights())
@settings(max_examples=60, deadline=None)
def test_a_weight_is_off_by_half_a_step_at_most(kind: str, dtype: Any, weight: np.ndarray) -> None:
    weight = weight.astype(dtype)
    scale = scales(weight, kind, np)
    numbers = rounded(weight, scale, kind, np)
    exact = weight.astype(np.float64)
    off = np.abs(numbers.astype(np.float64) * scale[:, None] - exact)
    if kind == "int8":
        allowed = scale[:, None] / 2
    else:  # three bits of mantissa, and below 2**-6 steps of 2**-9
        allowed = np.maximum(np.abs(exact) * 2.0**-4, scale[:, None] * 2.0**-10)
    assert (off <= allowed * (1 + 1e-5)).all()
    largest = np.abs(numbers.astype(np.float32)).max(axis=1)
    assert ((largest == KINDS[kind].largest) | (exact == 0).all(axis=1)).all()


@pytest.mark.parametrize("kind", KINDS)
@given(weight=weights())
@settings(max_examples=20, deadline=None)
def test_compiled_programs_round_as_numpy_does(kind: str, weight: np.ndarray) -> None:
    scale = jax.jit(partial(scales, kind=kind))(weight)
    np.testing.assert_array_equal(scale, scales(weight, kind, np))
    numbers = jax.jit(partial(rounded, kind=kind))(weight, scale)
    np.testing.assert_array_equal(
        np.asarray(numbers).view(np.uint8), rounded(weight, np.asarray(scale), kind, np).view(np.uint8)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_are_multiplied_in_full_precision_whatever_the_weight_is_kept_in(kind: str) -> None:
    x, weight = jnp.ones((3, 8), jnp.float32), jnp.ones((4, 8), KINDS[kind].dtype)
    assert "HIGHEST" in jax.jit(matmul_nk).lower(x, weight).as_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_quantised_layer_multiplies_with_its_numbers_and_adds_its_bias(kind: str, dtype: str) -> None:
    layer = Linear(40, 24, partition=PartitionSpec(None, None), bias=True, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(24, dtype=dtype)
    layer.quantise(kind)
    x = jax.random.normal(jax.random.key(1), (5, 40), dtype)
    weight = np.asarray(layer.weight[...]).astype(np.float64) * np.asarray(layer.scale[...])[:, None]
    expected = np.asarray(x, np.float64) @ weight.T + np.arange(24)
    found = layer(x)
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5)
