"""Attention over pages on the CPU: `pallas_kernels.xla.paged_attention`'s functions.

Each sequence's own pages are read once for each KV head and tile, and no others.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.native.library import target

DTYPES = ("bfloat16", "float32")
DIM_MULTIPLE = 32  # of head sizes


def refuse(shape: AttentionShape) -> str | None:
    """What of `shape` the kernels do not take and what they do, or None."""
    if shape.dtype not in DTYPES:
        return f"the dtype is {shape.dtype} and native attention takes {', '.join(DTYPES)}"
    for size in (shape.head_dim, shape.value_dim):
        if size % DIM_MULTIPLE:
            return f"the head size is {size} and native attention takes multiples of {DIM_MULTIPLE}"
    return None


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
    """`pallas_kernels.xla.paged_attention.paged_decode_attention`, for what `refuse` has nothing against."""
    pages = (k_pages, v_pages, page_table)
    return _call("paged_decode_attention", q, pages, lengths, scale, window, soft_cap, sinks)


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
    """`pallas_kernels.xla.paged_attention.paged_prefill_attention`, for what `refuse` has nothing against.

    Tiles come in the order of their tokens, as `prefill_tiles` makes them.
    """
    del tile_size  # the tiles say how many tokens they have
    pages = (k_pages, v_pages, page_table)
    return _call("paged_prefill_attention", q, pages, tiles, scale, window, soft_cap, sinks)


def _call(
    name: str,
    q: jax.Array,
    pages: tuple[jax.Array, jax.Array, jax.Array],
    places: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    result = jax.ShapeDtypeStruct((*q.shape[:-1], pages[1].shape[-1]), q.dtype)
    return jax.ffi.ffi_call(target(name), result, vmap_method="sequential")(
        q,
        *pages,
        places,
        jnp.zeros(0, jnp.float32) if sinks is None else jnp.asarray(sinks, jnp.float32),
        scale=np.float32(scale),
        window=np.int64(window or 0),
        soft_cap=np.float32(soft_cap or 0),
    )
