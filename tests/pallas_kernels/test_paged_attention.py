"""Paged attention against a float64 reference, over random shapes, lengths and page tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.xla.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.tiles import prefill_tiles
from pallas_kernels.xla.write_pages import write_pages
from tests.pallas_kernels.reference import check_decode, check_prefill

shapes = {
    "kv_heads": st.sampled_from([1, 2, 5]),
    "group": st.sampled_from([1, 3, 8]),
    "head_dim": st.sampled_from([16, 40, 80]),
    "page_size": st.sampled_from([8, 16, 64]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "window": st.sampled_from([None, None, 1, 7, 16, 50]),
    "soft_cap": st.sampled_from([None, None, 2.0]),
    "with_sinks": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 8, 16, 17, 63, 64, 65, 130]), min_size=1, max_size=4),
    queries=st.sampled_from([1, 1, 2, 5]),
    **shapes,
)
def test_decode_equals_float64_attention_and_reads_no_unused_position(**case):
    check_decode(paged_decode_attention, **case)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 9, 64]), st.sampled_from([1, 5, 16, 17, 40])), min_size=1, max_size=3
    ),
    tile_size=st.sampled_from([8, 16, 32]),
    **shapes,
)
def test_prefill_equals_causal_float64_attention_for_ragged_chunks(**case):
    check_prefill(paged_prefill_attention, **case)


@given(
    counts=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    size=st.sampled_from([1, 8, 64]),
    data=st.data(),
)
def test_tiles_cover_every_token_of_every_row_exactly_once(counts, size, data):
    positions = np.array(data.draw(st.lists(st.integers(0, 500), min_size=len(counts), max_size=len(counts))))
    starts = np.cumsum(counts) - counts
    tiles = prefill_tiles(starts, np.array(counts), positions, size, sum(counts) // size + len(counts))
    covered = [
        (row, start + i, position + i)
        for row, start, count, position in tiles.T.tolist()
        for i in range(min(count, size))
    ]
    expected = [(row, starts[row] + i, positions[row] + i) for row, count in enumerate(counts) for i in range(count)]
    assert sorted(covered) == sorted(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write_puts_each_token_in_its_place_and_drops_padding(dtype):
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.normal(size=(5, 3, 8, 16)), dtype)
    values = jnp.asarray(rng.normal(size=(4, 3, 16)), dtype)
    ids, offsets = np.array([4, 0, 5, 0]), np.array([7, 2, 0, 3])  # page 5 is outside the pool
    written = jax.jit(write_pages)(pages, values, ids, offsets)
    expected = np.array(pages.astype(jnp.float32))
    for token in (0, 1, 3):
        expected[ids[token], :, offsets[token]] = values[token].astype(jnp.float32)
    np.testing.assert_array_equal(np.asarray(written, np.float32), expected)
