"""What others offer for the same work on JAX. Each is given its own layout, and what it asks for beforehand is free.

A decode baseline is `make(sizes, batch, context, tables, pool) -> (step, constants)`, for `timing.loop_seconds`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scripts.gpu.ceilings import random_array
from scripts.gpu.timing import on_gpu


def _gather(sizes: Any, batch: int, context: int, tables: jax.Array, pool: tuple[jax.Array, jax.Array]) -> Any:
    """Plain XLA: all pages of all rows are gathered, then attended to."""
    group = sizes.heads // sizes.kv_heads

    def step(index, q, constants):
        tables, k, v = constants
        table = tables[index % len(tables)]
        q = q.reshape(batch, sizes.kv_heads, group, sizes.head_dim)
        scores = jnp.einsum("bhgd,bphtd->bhgpt", q, k[table], preferred_element_type=jnp.float32)
        scores = scores.reshape(*scores.shape[:3], -1) * sizes.head_dim**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*scores.shape[:3], table.shape[1], -1)
        out = jnp.einsum("bhgpt,bphtd->bhgd", weights, v[table], preferred_element_type=jnp.float32)
        return out.reshape(batch, 1, sizes.heads, sizes.head_dim).astype(q.dtype)

    return step, (tables, *pool)


def _triton(sizes: Any, batch: int, context: int, tables: jax.Array, pool: tuple[jax.Array, jax.Array]) -> Any:
    """JAX's own paged attention, on pages `[kv_heads, pages, page_size, head_dim]`; it expects scaled queries."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    lengths = jnp.full(batch, context, jnp.int32)
    compute_block = min(2, context // sizes.page_size)  # its default of 8 pages is more than shared memory holds
    splits = max(1, min(16, context // sizes.page_size // compute_block))

    def step(index, q, constants):
        tables, k, v = constants
        scaled = (q[:, 0] * sizes.head_dim**-0.5).astype(q.dtype)
        out = paged_attention(
            scaled,
            k,
            v,
            tables[index % len(tables)],
            lengths,
            pages_per_compute_block=compute_block,
            k_splits=splits,
            interpret=not on_gpu(),
        )
        return out[:, None].astype(q.dtype)

    return step, (tables, *(jnp.swapaxes(pages, 0, 1) for pages in pool))


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Dense attention, `[batch, tokens, heads, head_dim]`; XLA's where there is no cuDNN."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn" if on_gpu() else "xla")


def _cudnn_dense(sizes: Any, batch: int, context: int, tables: jax.Array, pool: Any) -> Any:
    del tables, pool
    shape = (batch, context, sizes.kv_heads, sizes.head_dim)
    return lambda index, q, kv: cudnn(q, *kv, causal=False), (random_array(1, shape), random_array(2, shape))


def ragged_dot(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, weights.swapaxes(1, 2), group_sizes)


DECODE: dict[str, Callable] = {
    "XLA gather": _gather,
    "JAX Triton": _triton,
    "cuDNN, dense": _cudnn_dense,
}
