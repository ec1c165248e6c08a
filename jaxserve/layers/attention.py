"""Attention's projections. How keys and values are kept and attended to is the caller's (`Attend`)."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rotary import apply_rope

Rope = tuple[jax.Array, jax.Array]  # cosines and sines, from `rotary.rope_tables`


class Attend(Protocol):
    """Stores one layer's keys and values and attends to all that the queries may see.

    `q` `[..., tokens, heads, head_dim]`, `k` and `v` `[..., tokens, kv_heads, head_dim]`, rotated already; the result
    has `q`'s shape and dtype. Query head `h` belongs to KV head `h // (heads // kv_heads)`. `scale`, `window`,
    `soft_cap` and `sinks` are `pallas_kernels.xla.paged_attention`'s.
    """

    def __call__(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> jax.Array: ...


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245) and what families vary in it.

    The fused weight's rows go group by group: the query heads of a KV head, its key, its value. A contiguous split
    over the mesh then gives each device whole groups, whatever the mesh. `q_norm` and `k_norm` act on
    `[..., heads, head_dim]` before the rotation. `scale` is `head_dim ** -0.5` if left out.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        interleaved_rope: bool = False,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        o_bias: bool = False,
        sinks: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.group = num_heads // num_kv_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.qkv = Linear(
            hidden_size,
            num_kv_heads * (self.group + 2) * head_dim,
            partition=PartitionSpec("tensor", None),
            parts=(self.group * head_dim, head_dim, head_dim),
            bias=qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.o = Linear(
            num_heads * head_dim,
            hidden_size,
            partition=PartitionSpec(None, "tensor"),
            bias=o_bias,
            dtype=dtype,
            rngs=rngs,
        )
        zeros, by_head = jnp.zeros((num_heads,), dtype), PartitionSpec("tensor")
        self.sinks = nnx.Param(zeros, partition=by_head, parts=(num_heads,)) if sinks else None
        self.q_norm, self.k_norm = q_norm, k_norm
        self.interleaved_rope = interleaved_rope
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window, self.soft_cap = window, soft_cap

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        """`[..., tokens, hidden]` to the same; no rotation without `rope`."""
        qkv = self.qkv(x).reshape(*x.shape[:-1], self.num_kv_heads, self.group + 2, self.head_dim)
        q = qkv[..., : self.group, :].reshape(*x.shape[:-1], -1, self.head_dim)
        k, v = qkv[..., self.group, :], qkv[..., self.group + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (apply_rope(heads, *rope, interleaved=self.interleaved_rope) for heads in (q, k))
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        out = attend(layer, q, k, v, scale=self.scale, window=self.window, soft_cap=self.soft_cap, sinks=sinks)
        return self.o(out.reshape(*x.shape[:-1], -1))
