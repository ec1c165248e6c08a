"""Grouped matrix products against numpy in float64, over random group sizes."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.xla.grouped_matmul import grouped_matmul

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # relative to the largest value


# Tokens, groups, out and in features: few, since each is compiled once.
SHAPES = [(1, 1, 1, 1), (60, 7, 24, 40), (300, 3, 65, 17), (300, 64, 16, 8)]
run = jax.jit(grouped_matmul)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 31, 64, 130]), min_size=64, max_size=64),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
@example(shape=SHAPES[1], sizes=[0] * 64, dtype="float32", seed=0)  # nothing but padding
@example(shape=SHAPES[2], sizes=[0, 300] + [0] * 62, dtype="float32", seed=0)  # all in one group
@example(shape=SHAPES[3], sizes=[1] * 64, dtype="float32", seed=0)
def test_equals_float64_products_and_is_zero_where_no_group_is(shape, sizes, dtype, seed):
    random = np.random.default_rng(seed)
    tokens, groups, out_features, in_features = shape
    ends = np.minimum(np.cumsum(sizes[:groups]), tokens)
    starts = np.concatenate([[0], ends[:-1]])
    x = jnp.asarray(random.normal(size=(tokens, in_features)), dtype)
    weights = jnp.asarray(random.normal(size=(groups, out_features, in_features)), dtype)
    found = run(x, weights, jnp.asarray(ends - starts, jnp.int32))
    assert found.dtype == x.dtype
    rows, stored = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    expected = np.zeros((tokens, out_features))
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        expected[start:end] = rows[start:end] @ stored[group].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(expected).max()))
    assert not np.any(np.asarray(found, np.float32)[ends[-1] :])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_and_weights_of_no_group_disturb_nothing(value):
    x = jnp.ones((6, 4)).at[3:].set(value)
    weights = jnp.ones((3, 5, 4)).at[1].set(value)
    found = grouped_matmul(x, weights, jnp.asarray([1, 0, 2]))
    np.testing.assert_array_equal(found, np.where(np.arange(6)[:, None] < 3, 4.0, 0.0) * np.ones((6, 5)))


def test_costs_what_its_active_groups_cost():
    groups, tokens = 64, 64
    x, weights = jnp.ones((tokens, 512)), jnp.ones((groups, 512, 512))  # 1 MiB a group

    def seconds(active: int) -> float:
        sizes = np.zeros(groups, np.int32)
        sizes[:active] = tokens // active
        times = []
        for _ in range(9):
            start = time.perf_counter()
            run(x, weights, sizes).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    seconds(64)
    assert seconds(64) > 4 * seconds(4)
