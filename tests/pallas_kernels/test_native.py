"""The C++ kernels against float64, and what happens where they cannot be built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.native import library
from pallas_kernels.native.matmul import matmul_nk
from pallas_kernels.native.paged_attention import paged_decode_attention, paged_prefill_attention
from tests.pallas_kernels.reference import check_decode, check_prefill

built = pytest.mark.skipif(
    not library.available(), reason=f"the native kernels cannot be built here: {library.refusal()}"
)


@built
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 65),
    inner=st.sampled_from([1, 2, 31, 32, 33, 63, 100, 257, 1024]),
    outer=st.sampled_from([1, 7, 15, 16, 17, 24, 40, 129, 2050]),
    seed=st.integers(0, 1000),
)
def test_matmul_equals_float64_for_any_sizes(rows, inner, outer, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(outer, inner)), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # Float32 sums of exact products: each addition errs by 2^-24 of what was summed up so far.
    bound = 2.0**-24 * inner * (np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T)
    assert np.all(np.abs(np.asarray(jax.jit(matmul_nk)(x, weight)) - expected) <= bound + 1e-30)


shapes = {
    "kv_heads": st.sampled_from([1, 2, 5]),
    "group": st.sampled_from([1, 2, 3, 4, 7]),
    "head_dim": st.sampled_from([32, 64, 96, 128, 192]),
    "page_size": st.sampled_from([1, 8, 16, 40, 64]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "window": st.sampled_from([None, None, 1, 7, 16, 50]),
    "soft_cap": st.sampled_from([None, None, 2.0]),
    "with_sinks": st.booleans(),
    "seed": st.integers(0, 1000),
}


@built
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 8, 16, 17, 63, 64, 65, 130, 333]), min_size=1, max_size=5),
    queries=st.sampled_from([1, 1, 2, 5, 8]),
    **shapes,
)
def test_decode_equals_float64_attention_and_reads_no_unused_position(**case):
    check_decode(paged_decode_attention, **case)


@built
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 9, 64]), st.sampled_from([1, 5, 16, 17, 40])), min_size=1, max_size=3
    ),
    tile_size=st.sampled_from([8, 16, 32]),
    **shapes,
)
def test_prefill_equals_causal_float64_attention_for_ragged_chunks(**case):
    check_prefill(paged_prefill_attention, **case)
