"""Paged attention in plain XLA: the reference of every kernel, and what runs where there is no kernel.

One page of every row is read at a time, under a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867):
nothing is gathered that is not used at once, and no more pages are read than the longest row has.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite: a row that sees nothing must not turn into NaN
_FLOOR = -1e29  # where a running maximum starts: what is masked lies so far below it that its weight is 0, not 1


class _Softmax(NamedTuple):
    """A weighted sum of values under way: `[batch, kv_heads, queries]`, `accumulated` with the value's size behind."""

    largest: jax.Array
    weight: jax.Array
    accumulated: jax.Array

    @classmethod
    def start(cls, rows: tuple[int, ...], value_dim: int, sinks: jax.Array | None) -> "_Softmax":
        """Nothing seen yet but the sinks, float32 `[kv_heads, queries]`: logits that take weight and give no value."""
        accumulated = jnp.zeros((*rows, value_dim), jnp.float32)
        if sinks is None:
            return cls(jnp.full(rows, _FLOOR, jnp.float32), jnp.zeros(rows, jnp.float32), accumulated)
        return cls(jnp.broadcast_to(sinks, rows), jnp.ones(rows, jnp.float32), accumulated)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, soft_cap: float | None
    ) -> "_Softmax":
        """Take in a page: `q` `[b, h, queries, d]`, `k` and `v` `[b, h, page, d]`, `visible` `[b, 1, queries, page]`"""
        precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
        # What no query sees may be another sequence's leftovers, even NaN, which a weight of zero would let through.
        v = jnp.where(visible.any(axis=2)[..., None], v, 0)
        scores = jnp.einsum("bhqd,bhpd->bhqp", q, k, precision=precision, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible, scores, _MASKED)
        largest = jnp.maximum(self.largest, scores.max(axis=-1))
        shrink = jnp.exp(self.largest - largest)
        weights = jnp.exp(scores - largest[..., None])
        new = jnp.einsum(
            "bhqp,bhpd->bhqd", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return _Softmax(
            largest, self.weight * shrink + weights.sum(axis=-1), self.accumulated * shrink[..., None] + new
        )

    def result(self) -> jax.Array:
        return self.accumulated / jnp.maximum(self.weight, 1e-30)[..., None]


def _scaled(q: jax.Array, scale: float, dtype: jnp.dtype) -> jax.Array:
    return (q.astype(jnp.float32) * scale).astype(dtype)


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of the newest one or few tokens of each sequence over its pages, their own included.

    `q` `[batch, queries, heads, head_dim]`: query `i` is at position `lengths[b] - queries + i`. Pages `[pages,
    kv_heads, page_size, head_dim]`, of values possibly with a head size of their own. `page_table` int32
    `[batch, max_pages]`, `lengths` int32 `[batch]`. Scores are `q·k * scale`, then `soft_cap * tanh(score / soft_cap)`
    if it is given. A query sees the last `window` positions, its own among them, or all. `sinks` float32 `[heads]` are
    logits that take their share of the softmax and bring no value. Returns `[batch, queries, heads, value_dim]` in
    `q`'s dtype; zeros for a query that sees nothing.
    """
    batch, queries, heads, head_dim = q.shape
    _, kv_heads, page_size, value_dim = v_pages.shape
    group = heads // kv_heads
    q_bhqd = _scaled(q, scale, k_pages.dtype).reshape(batch, queries, kv_heads, group, head_dim)
    q_bhqd = q_bhqd.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, queries * group, head_dim)
    positions = lengths[:, None] - queries + jnp.repeat(jnp.arange(queries), group)  # [batch, queries * group]
    oldest = jnp.zeros_like(positions) if window is None else jnp.maximum(positions - window + 1, 0)
    first_pages = jnp.maximum(oldest[:, 0], 0) // page_size

    def one_page(index: jax.Array, softmax: _Softmax) -> _Softmax:
        pages = first_pages + index
        ids = jnp.take_along_axis(page_table, pages[:, None], axis=1, mode="clip")[:, 0]
        keys = (pages * page_size)[:, None] + jnp.arange(page_size)
        visible = (keys[:, None] <= positions[..., None]) & (keys[:, None] >= oldest[..., None])
        return softmax.attend(q_bhqd, k_pages[ids], v_pages[ids], visible[:, None], soft_cap)

    sinks_hq = None if sinks is None else jnp.tile(sinks.reshape(kv_heads, group), (1, queries))
    softmax = _Softmax.start((batch, kv_heads, queries * group), value_dim, sinks_hq)
    pages_read = (-(-lengths // page_size) - first_pages).max()
    out = jax.lax.fori_loop(0, pages_read, one_page, softmax).result()
    out = out.reshape(batch, kv_heads, queries, group, value_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, queries, heads, value_dim).astype(q.dtype)


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    tiles: jax.Array,
    *,
    tile_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of chunks of many sequences, laid out one after the other on a flat token axis.

    `q` `[tokens, heads, head_dim]`, pages `[pages, kv_heads, page_size, head_dim]` that hold the chunks' own keys and
    values already, `page_table` int32 `[rows, max_pages]`, `tiles` from `prefill_tiles` with the same `tile_size`.
    The other arguments are `paged_decode_attention`'s. Returns `[tokens, heads, value_dim]` in `q`'s dtype; zeros for
    tokens that are in no tile.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, value_dim = v_pages.shape
    group = heads // kv_heads
    q_padded = jnp.pad(_scaled(q, scale, k_pages.dtype), ((0, tile_size), (0, 0), (0, 0)))
    sinks_hq = None if sinks is None else jnp.repeat(sinks.reshape(kv_heads, group), tile_size, axis=1)

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        row, start, count, position = tiles[:, index]
        q_thd = jax.lax.dynamic_slice_in_dim(q_padded, start, tile_size)
        q_hgtd = q_thd.reshape(tile_size, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        q_bhqd = q_hgtd.reshape(1, kv_heads, group * tile_size, head_dim)
        limits = jnp.tile(position + jnp.arange(tile_size), group)
        oldest = jnp.zeros_like(limits) if window is None else limits - window + 1
        first_page = jnp.maximum(oldest[0], 0) // page_size
        pages = page_table[row]

        def one_page(index: jax.Array, softmax: _Softmax) -> _Softmax:
            ids = pages[index][None]
            keys = index * page_size + jnp.arange(page_size)
            visible = (keys <= limits[:, None]) & (keys >= oldest[:, None]) & (keys < position + count)
            return softmax.attend(q_bhqd, k_pages[ids], v_pages[ids], visible[None, None], soft_cap)

        softmax = _Softmax.start((1, kv_heads, group * tile_size), value_dim, sinks_hq)
        pages_read = -(-(position + count) // page_size)
        attended = jax.lax.fori_loop(first_page, pages_read, one_page, softmax).result()
        attended = attended.reshape(kv_heads, group, tile_size, value_dim).transpose(2, 0, 1, 3)
        attended = attended.reshape(tile_size, heads, value_dim).astype(q.dtype)
        # The tile's tail may reach into the next row's tokens, which are another tile's to write.
        before = jax.lax.dynamic_slice_in_dim(out, start, tile_size)
        mine = (jnp.arange(tile_size) < count)[:, None, None]
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, attended, before), start, axis=0)

    used = jnp.sum(tiles[2] > 0)
    out = jax.lax.fori_loop(0, used, one_tile, jnp.zeros((tokens + tile_size, heads, value_dim), q.dtype))
    return out[:tokens]
