"""Paged attention in plain XLA: the reference of every kernel, and what runs where there is no kernel.

One page of every row is read at a time, under a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867):
nothing is gathered that is not used at once, and no more pages are read than the longest row has.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite: a row that sees nothing must not turn into NaN


class _Softmax(NamedTuple):
    """A weighted sum of values under way: `[batch, kv_heads, queries]`, `accumulated` with `head_dim` behind."""

    largest: jax.Array
    weight: jax.Array
    accumulated: jax.Array

    @classmethod
    def empty(cls, q: jax.Array) -> "_Softmax":
        rows = q.shape[:-1]
        return cls(jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(q.shape, jnp.float32))

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> "_Softmax":
        """Take in a page: `q` `[b, h, queries, d]`, `k` and `v` `[b, h, page, d]`, `visible` `[b, 1, queries, page]`"""
        precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
        # What no query sees may be another sequence's leftovers, even NaN, which a weight of zero would let through.
        v = jnp.where(visible.any(axis=2)[..., None], v, 0)
        scores = jnp.einsum("bhqd,bhpd->bhqp", q, k, precision=precision, preferred_element_type=jnp.float32)
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
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """Attention of one query per sequence over all of its `lengths[b]` positions, the query's own included.

    `q` `[batch, heads, head_dim]`, pages `[pages, kv_heads, page_size, head_dim]`, `page_table` int32
    `[batch, max_pages]`, `lengths` int32 `[batch]`. Returns `q`'s shape and dtype; zeros for a length of 0.
    """
    batch, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    q_bhgd = _scaled(q, scale, k_pages.dtype).reshape(batch, kv_heads, heads // kv_heads, head_dim)

    def one_page(index: jax.Array, softmax: _Softmax) -> _Softmax:
        ids = page_table[:, index]
        visible = index * page_size + jnp.arange(page_size) < lengths[:, None]
        return softmax.attend(q_bhgd, k_pages[ids], v_pages[ids], visible[:, None, None, :])

    pages_read = -(-lengths.max() // page_size)
    out = jax.lax.fori_loop(0, pages_read, one_page, _Softmax.empty(q_bhgd)).result()
    return out.reshape(q.shape).astype(q.dtype)


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    tiles: jax.Array,
    *,
    tile_size: int,
    scale: float,
) -> jax.Array:
    """Causal attention of chunks of many sequences, laid out one after the other on a flat token axis.

    `q` `[tokens, heads, head_dim]`, pages `[pages, kv_heads, page_size, head_dim]` that hold the chunks' own keys and
    values already, `page_table` int32 `[rows, max_pages]`, `tiles` from `prefill_tiles` with the same `tile_size`.
    Returns `q`'s shape and dtype; zeros for tokens that are in no tile.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    group = heads // kv_heads
    q_padded = jnp.pad(_scaled(q, scale, k_pages.dtype), ((0, tile_size), (0, 0), (0, 0)))

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        row, start, count, position = tiles[:, index]
        q_thd = jax.lax.dynamic_slice_in_dim(q_padded, start, tile_size)
        q_hgtd = q_thd.reshape(tile_size, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        q_bhqd = q_hgtd.reshape(1, kv_heads, group * tile_size, head_dim)
        limits = jnp.tile(position + jnp.arange(tile_size), group)
        pages = page_table[row]

        def one_page(index: jax.Array, softmax: _Softmax) -> _Softmax:
            ids = pages[index][None]
            keys = index * page_size + jnp.arange(page_size)
            visible = (keys <= limits[:, None]) & (keys < position + count)
            return softmax.attend(q_bhqd, k_pages[ids], v_pages[ids], visible[None, None])

        pages_read = -(-(position + count) // page_size)
        attended = jax.lax.fori_loop(0, pages_read, one_page, _Softmax.empty(q_bhqd)).result()
        attended = attended.reshape(kv_heads, group, tile_size, head_dim).transpose(2, 0, 1, 3)
        attended = attended.reshape(tile_size, heads, head_dim).astype(q.dtype)
        # The tile's tail may reach into the next row's tokens, which are another tile's to write.
        before = jax.lax.dynamic_slice_in_dim(out, start, tile_size)
        mine = (jnp.arange(tile_size) < count)[:, None, None]
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, attended, before), start, axis=0)

    used = jnp.sum(tiles[2] > 0)
    out = jax.lax.fori_loop(0, used, one_tile, jnp.zeros((tokens + tile_size, heads, head_dim), q.dtype))
    return out[:tokens]
