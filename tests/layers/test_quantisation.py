"""Weights in few bits: how far each may be off, and that numpy and compiled programs round alike."""

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

from jaxserve.errors import InputError
from jaxserve.layers.linear import Linear
from jaxserve.layers.quantisation import EIGHT_BITS, KINDS, Quantised, made
from pallas_kernels.matmul import matmul_nk
from pallas_kernels.xla.matmul import unpacked


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    random = np.random.default_rng(draw(st.integers(0, 100)))
    size = 10.0 ** draw(st.integers(-6, 4))
    weight = (size * random.standard_t(2, (rows, columns))).astype(np.float32)
    weight[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from([0, 1]))
    return weight


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@given(weight=weights())
@settings(max_examples=60, deadline=None)
def test_a_weight_is_off_by_half_a_step_at_most(kind: str, dtype: Any, weight: np.ndarray) -> None:
    weight = weight.astype(dtype)
    numbers, scale = (made(weight, Quantised(kind, part), np) for part in ("weight", "scale"))
    exact = weight.astype(np.float64)
    off = np.abs(numbers.astype(np.float64) * scale[:, None] - exact)
    if kind == "int8":
        allowed = scale[:, None] / 2
    else:  # three bits of mantissa, and below 2**-6 steps of 2**-9
        allowed = np.maximum(np.abs(exact) * 2.0**-4, scale[:, None] * 2.0**-10)
    assert (off <= allowed * (1 + 1e-5)).all()
    largest = np.abs(numbers.astype(np.float32)).max(axis=1)
    assert ((largest == EIGHT_BITS[kind].largest) | (exact == 0).all(axis=1)).all()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@given(weight=weights(), group=st.sampled_from([2, 6, 32]), repeats=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_a_weight_of_four_bits_is_off_by_half_a_step_of_its_group(
    dtype: Any, weight: np.ndarray, group: int, repeats: int
) -> None:
    weight = np.tile(weight, (1, group)).astype(dtype)
    parts = [made(weight, Quantised("int4", part, group, repeats), np) for part in ("weight", "scale", "zero")]
    assert [part.dtype for part in parts] == [np.uint8, np.float32, np.int8]
    groups = weight.astype(np.float64).reshape(len(weight), -1, group)
    steps = np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)
    found = np.asarray(unpacked(parts[0], *(part[:, ::repeats] for part in parts[1:]), jnp.float32), np.float64)
    off = np.abs(found.reshape(groups.shape) - groups)
    assert (off <= steps[..., None] / 15 / 2 * (1 + 1e-5)).all()
    assert (found.reshape(groups.shape)[groups == 0] == 0).all()
    for part in parts[1:]:
        np.testing.assert_array_equal(part, np.repeat(part[:, ::repeats], repeats, axis=1))


PARTS = [Quantised(kind, part) for kind in EIGHT_BITS for part in ("weight", "scale")]
PARTS += [Quantised("int4", part, 2, 2) for part in ("weight", "scale", "zero")]


@pytest.mark.parametrize("own", PARTS, ids=str)
@given(weight=weights())
@settings(max_examples=20, deadline=None)
def test_compiled_programs_round_as_numpy_does(own: Quantised, weight: np.ndarray) -> None:
    weight = np.tile(weight, (1, 2))
    found, expected = np.asarray(jax.jit(partial(made, own=own))(weight)), made(weight, own, np)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_float32_rows_are_multiplied_in_full_precision_whatever_the_weight_is_kept_in(kind: str) -> None:
    x, weight = jnp.ones((3, 8), jnp.float32), jnp.ones((4, 8), EIGHT_BITS[kind].dtype)
    assert "HIGHEST" in jax.jit(matmul_nk).lower(x, weight).as_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_quantised_layer_multiplies_with_its_numbers_and_adds_its_bias(kind: str, dtype: str) -> None:
    layer = Linear(40, 24, partition=PartitionSpec(None, None), bias=True, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(24, dtype=dtype)
    layer.quantise(kind, group=8)
    x = jax.random.normal(jax.random.key(1), (5, 40), dtype)
    if kind == "int4":
        weight = np.asarray(unpacked(layer.weight[...], layer.scale[...], layer.zero[...], jnp.float32), np.float64)
    else:
        weight = np.asarray(layer.weight[...]).astype(np.float64) * np.asarray(layer.scale[...])[:, None]
    expected = np.asarray(x, np.float64) @ weight.T + np.arange(24)
    found = layer(x)
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize(("in_features", "group", "devices"), [(40, 16, 1), (36, 6, 4)])
def test_rows_that_are_no_whole_groups_on_every_device_are_refused(in_features: int, group: int, devices: int) -> None:
    layer = Linear(in_features, 8, partition=PartitionSpec(None, "tensor"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=f"a layer has {in_features} inputs, .* groups of {group}"):
        layer.quantise("int4", group=group, devices=devices)
