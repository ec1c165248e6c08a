"""Attention in float64, random page pools to run a kernel on, and the comparison of the two."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.xla.tiles import prefill_tiles

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


class Pool:
    """Sequences of random keys and values, scattered over a page pool whose unused positions are NaN.

    Each begins with up to `shared` whole pages of the one before the last.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        lengths: list[int],
        kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: str,
        shared: int = 0,
    ):
        needed = [-(-length // page_size) for length in lengths]
        spare = 2
        pages = np.full((2, sum(needed) + spare, kv_heads, page_size, head_dim), np.nan, np.float32)
        ids = rng.permutation(sum(needed) + spare)
        self.nan_page = ids[-1]
        self.table = np.full((len(lengths), max([*needed, 1])), self.nan_page, np.int32)
        self.keys, self.values = [], []
        for row, length in enumerate(lengths):
            own, ids = ids[: needed[row]], ids[needed[row] :]
            self.table[row, : len(own)] = own
            stored = np.array(jnp.asarray(rng.normal(size=(2, length, kv_heads, head_dim)), dtype), np.float32)
            if row >= 2:
                same = min(shared, length // page_size, lengths[row - 2] // page_size)
                self.table[row, :same] = self.table[row - 2, :same]
                stored[0, : same * page_size] = self.keys[-2][: same * page_size]
                stored[1, : same * page_size] = self.values[-2][: same * page_size]
            for position in range(length):
                pages[:, self.table[row, position // page_size], :, position % page_size] = stored[:, position]
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


def variant_of(rng, heads: int, head_dim: int, window, soft_cap, with_sinks: bool) -> dict:
    sinks = rng.normal(size=heads).astype(np.float32) if with_sinks else None
    return {"scale": head_dim**-0.5, "window": window, "soft_cap": soft_cap, "sinks": sinks}


def check_decode(
    attend: Callable[..., jax.Array],
    *,
    lengths: list[int],
    queries: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    window: int | None,
    soft_cap: float | None,
    with_sinks: bool,
    seed: int,
    shared: int = 0,
) -> None:
    """`attend`, a `paged_decode_attention`, against `reference`."""
    rng = np.random.default_rng(seed)
    pool = Pool(rng, lengths, kv_heads, page_size, head_dim, dtype, shared)
    q = jnp.asarray(rng.normal(size=(len(lengths), queries, kv_heads * group, head_dim)), dtype)
    variant = variant_of(rng, kv_heads * group, head_dim, window, soft_cap, with_sinks)
    if window is not None:  # pages that the first query no longer sees may belong to others
        for row, length in enumerate(lengths):
            pool.table[row, : max(0, length - queries + 1 - window) // page_size] = pool.nan_page
    out = attend(q, pool.k, pool.v, jnp.asarray(pool.table), jnp.asarray(lengths, jnp.int32), **variant)
    for row, length in enumerate(lengths):
        for query in range(queries):
            seen = max(0, length - queries + query + 1)
            expected = reference(
                np.asarray(q[row, query], np.float64), pool.keys[row][:seen], pool.values[row][:seen], **variant
            )
            np.testing.assert_allclose(
                np.asarray(out[row, query], np.float64), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )


def check_prefill(
    attend: Callable[..., jax.Array],
    *,
    rows: list[tuple[int, int]],
    tile_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    window: int | None,
    soft_cap: float | None,
    with_sinks: bool,
    seed: int,
) -> None:
    """`attend`, a `paged_prefill_attention`, against `reference`.

    Each row `(before, count)` has `before` positions in pages already and brings `count` new ones.
    """
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
    if window is not None:
        for row, before in enumerate(positions):
            pool.table[row, : max(0, before + 1 - window) // page_size] = pool.nan_page
    out = attend(q, pool.k, pool.v, jnp.asarray(pool.table), jnp.asarray(tiles), tile_size=tile_size, **variant)
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
