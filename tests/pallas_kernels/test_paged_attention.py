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

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


class Pool:
    """Sequences of random keys and values, scattered over a page pool whose unused positions are NaN."""

    def __init__(
        self, rng: np.random.Generator, lengths: list[int], kv_heads: int, page_size: int, head_dim: int, dtype: str
    ):
        needed = [-(-length // page_size) for length in lengths]
        spare = 2
        pages = np.full((2, sum(needed) + spare, kv_heads, page_size, head_dim), np.nan, np.float32)
        ids = rng.permutation(sum(needed) + spare)
        self.table = np.full((len(lengths), max([*needed, 1])), ids[-1], np.int32)  # unused entries: a NaN page
        self.keys, self.values = [], []
        for row, length in enumerate(lengths):
            own, ids = ids[: needed[row]], ids[needed[row] :]
            self.table[row, : len(own)] = own
            stored = np.asarray(jnp.asarray(rng.normal(size=(2, length, kv_heads, head_dim)), dtype), np.float32)
            for position in range(length):
                pages[:, own[position // page_size], :, position % page_size] = stored[:, position]
            self.keys.append(stored[0].astype(np.float64))
            self.values.append(stored[1].astype(np.float64))
        self.k, self.v = jnp.asarray(pages, dtype)


def reference(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """One query `[heads, head_dim]` over all of `[positions, kv_heads, head_dim]`, the last its own, in float64."""
    group = q.shape[0] // keys.shape[1]
    if not len(keys):
        return np.zeros((q.shape[0], values.shape[-1]))
    keys, values = keys[-window:] if window else keys, values[-window:] if window else values
    scores = np.einsum("hd,phd->hp", q, np.repeat(keys, group, axis=1)) * scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    if sinks is not None:
        scores = np.concatenate([scores, sinks[:, None]], axis=1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[:, : len(keys)]
    return np.einsum("hp,phd->hd", weights, np.repeat(values, group, axis=1))


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


def variant_of(rng, heads: int, head_dim: int, window, soft_cap, with_sinks: bool) -> dict:
    sinks = rng.normal(size=heads).astype(np.float32) if with_sinks else None
    return {"scale": head_dim**-0.5, "window": window, "soft_cap": soft_cap, "sinks": sinks}


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 8, 16, 17, 63, 64, 65, 130]), min_size=1, max_size=4),
    queries=st.sampled_from([1, 1, 2, 5]),
    **shapes,
)
def test_decode_equals_float64_attention_and_reads_no_unused_position(
    lengths, queries, kv_heads, group, head_dim, page_size, dtype, window, soft_cap, with_sinks, seed
):
    rng = np.random.default_rng(seed)
    lengths = [max(length, queries) if length else 0 for length in lengths]
    pool = Pool(rng, lengths, kv_heads, page_size, head_dim, dtype)
    q = jnp.asarray(rng.normal(size=(len(lengths), queries, kv_heads * group, head_dim)), dtype)
    variant = variant_of(rng, kv_heads * group, head_dim, window, soft_cap, with_sinks)
    out = paged_decode_attention(q, pool.k, pool.v, jnp.asarray(pool.table), jnp.asarray(lengths), **variant)
    for row, length in enumerate(lengths):
        for query in range(queries):
            seen = max(0, length - queries + query + 1)
            expected = reference(
                np.asarray(q[row, query], np.float64), pool.keys[row][:seen], pool.values[row][:seen], **variant
            )
            np.testing.assert_allclose(
                np.asarray(out[row, query], np.float64), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 9, 64]), st.sampled_from([1, 5, 16, 17, 40])), min_size=1, max_size=3
    ),
    tile_size=st.sampled_from([8, 16, 32]),
    **shapes,
)
def test_prefill_equals_causal_float64_attention_for_ragged_chunks(
    rows, tile_size, kv_heads, group, head_dim, page_size, dtype, window, soft_cap, with_sinks, seed
):
    """Each row has `before` positions in pages already and brings `count` new ones."""
    rng = np.random.default_rng(seed)
    lengths = [before + count for before, count in rows]
    pool = Pool(rng, lengths, kv_heads, page_size, head_dim, dtype)
    counts = np.array([count for _, count in rows])
    positions = np.array([before for before, _ in rows])
    starts = np.cumsum(counts) - counts
    tokens = int(counts.sum()) + 3  # padding at the end, in no tile
    tiles = prefill_tiles(starts, counts, positions, tile_size, tokens // tile_size + len(rows) + 1)
    q = jnp.asarray(rng.normal(size=(tokens, kv_heads * group, head_dim)), dtype)
    variant = variant_of(rng, kv_heads * group, head_dim, window, soft_cap, with_sinks)
    out = paged_prefill_attention(
        q, pool.k, pool.v, jnp.asarray(pool.table), jnp.asarray(tiles), tile_size=tile_size, **variant
    )
    for row, (before, count) in enumerate(rows):
        for i in range(count):
            token, seen = starts[row] + i, before + i + 1
            expected = reference(
                np.asarray(q[token], np.float64), pool.keys[row][:seen], pool.values[row][:seen], **variant
            )
            np.testing.assert_allclose(
                np.asarray(out[token], np.float64), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )
    assert not np.any(np.asarray(out[-3:], np.float32))


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
