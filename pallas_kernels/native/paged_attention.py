"""Attention over pages on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native.library import target

DTYPES = (jnp.bfloat16, jnp.float32)
DIM_MULTIPLE = 32  # of head sizes


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
    """`pallas_kernels.xla.paged_attention.paged_decode_attention`; each row reads its own pages once and no others.

    `q` and pages have one dtype of `DTYPES`, and head sizes are multiples of `DIM_MULTIPLE`.
    """
    batch, queries, heads, _ = q.shape
    result = jax.ShapeDtypeStruct((batch, queries, heads, v_pages.shape[-1]), q.dtype)
    run = jax.ffi.ffi_call(target("paged_decode_attention"), result, vmap_method="sequential")
    return run(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(scale),
        window=np.int64(window or 0),
        soft_cap=np.float32(soft_cap or 0),
    )
