"""Attention's projections. How keys and values are kept and attended to is the caller's (`Attend`)."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rotary import apply_rope


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
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245) with optional biases and q/k norms.

    The fused weight's rows go group by group: the query heads of a KV head, its key, its value. A contiguous split
    over the mesh then gives each device whole groups, whatever the mesh.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        qk_norm_epsilon: float | None,
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
            num_heads * head_dim, hidden_size, partition=PartitionSpec(None, "tensor"), dtype=dtype, rngs=rngs
        )
        self.q_norm = None if qk_norm_epsilon is None else RMSNorm(head_dim, epsilon=qk_norm_epsilon, dtype=dtype)
        self.k_norm = None if qk_norm_epsilon is None else RMSNorm(head_dim, epsilon=qk_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, layer: int) -> jax.Array:
        """`[..., tokens, hidden]` to the same; `rope` from `rotary.rope_tables`."""
        qkv = self.qkv(x).reshape(*x.shape[:-1], self.num_kv_heads, self.group + 2, self.head_dim)
        q = qkv[..., : self.group, :].reshape(*x.shape[:-1], -1, self.head_dim)
        k, v = qkv[..., self.group, :], qkv[..., self.group + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, apply_rope(q, *rope), apply_rope(k, *rope), v, scale=self.head_dim**-0.5)
        return self.o(out.reshape(*x.shape[:-1], -1))
