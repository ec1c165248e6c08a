"""Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434), on a cache of the latents themselves."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.layers.attention import Attend, Rope
from jaxserve.layers.linear import Linear, Stack
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rotary import apply_rope
from jaxserve.parallel.mesh import TENSOR

_EPSILON = 1e-6  # of the norms on latents, whatever the model's own


class LowRankLinear(nnx.Module):
    """A linear layer through a norm in few dimensions."""

    def __init__(self, in_features: int, rank: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.down = Linear(in_features, rank, partition=PartitionSpec(None, None), dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(rank, epsilon=_EPSILON, dtype=dtype)
        self.up = Linear(rank, out_features, partition=PartitionSpec(TENSOR, None), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.norm(self.down(x)))


class LatentAttention(nnx.Module):
    """Attention whose keys and values are a linear map of one small latent a token.

    A head's key is `up_k @ latent` with a rotated part behind that all heads share, its value `up_v @ latent`. Both
    maps are moved over to the queries and the outputs, so that heads attend to the latents as they lie in the cache:
    one KV head, whose key is latent and rotated part, and whose value is the latent.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        q_rank: int | None,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        interleaved_rope: bool,
        scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        q_rows = num_heads * (nope_dim + rope_dim)
        self.q: Linear | LowRankLinear
        if q_rank is None:
            self.q = Linear(hidden_size, q_rows, partition=PartitionSpec(TENSOR, None), **settings)
        else:
            self.q = LowRankLinear(hidden_size, q_rank, q_rows, **settings)
        self.kv_down = Linear(hidden_size, kv_rank + rope_dim, partition=PartitionSpec(None, None), **settings)
        self.kv_norm = RMSNorm(kv_rank, epsilon=_EPSILON, dtype=dtype)
        # Two parameters of what a checkpoint holds as one: a slice of a weight is copied on every call.
        block = nope_dim + value_dim
        self.up_k = _by_head(num_heads, nope_dim, kv_rank, Stack(block=block), **settings)
        self.up_v = _by_head(num_heads, value_dim, kv_rank, Stack(block=block, first=nope_dim), **settings)
        self.o = Linear(num_heads * value_dim, hidden_size, partition=PartitionSpec(None, TENSOR), **settings)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.kv_rank, self.nope_dim = kv_rank, nope_dim
        self.interleaved_rope = interleaved_rope
        self.scale = scale

    def __call__(self, x: jax.Array, rope: Rope | None, attend: Attend, layer: int) -> jax.Array:
        """`[..., tokens, hidden]` to the same; no rotation without `rope`."""
        q = self.q(x).reshape(*x.shape[:-1], self.num_heads, -1)
        kv = self.kv_down(x)[..., None, :]
        latent = self.kv_norm(kv[..., : self.kv_rank])
        q_shared, k_shared = q[..., self.nope_dim :], kv[..., self.kv_rank :]
        if rope is not None:
            q_shared, k_shared = (
                apply_rope(heads, *rope, interleaved=self.interleaved_rope) for heads in (q_shared, k_shared)
            )
        q_latent = _per_head("...hn,hnr->...hr", q[..., : self.nope_dim], self.up_k[...])
        q = jnp.concatenate([q_latent, q_shared], axis=-1)
        k = jnp.concatenate([latent, k_shared], axis=-1)
        k = jnp.broadcast_to(k, (*k.shape[:-2], self.num_kv_heads, k.shape[-1]))
        out = attend(layer, q, k, k[..., : self.kv_rank], scale=self.scale)
        out = _per_head("...hr,hvr->...hv", out, self.up_v[...])
        return self.o(out.reshape(*x.shape[:-1], -1))


def _by_head(heads: int, rows: int, columns: int, stack: Stack, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Param:
    weight = nnx.initializers.normal(0.02)(rngs.params(), (heads, rows, columns), dtype)
    return nnx.Param(weight, partition=PartitionSpec(TENSOR, None, None), parts=(rows,), stacked=stack)


def _per_head(product: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None  # not TF32
    return jnp.einsum(product, x, weight, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)
