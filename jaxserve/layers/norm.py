"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019, arXiv:1910.07467), computed in float32."""

    def __init__(self, features: int, *, epsilon: float, offset: float = 0.0, dtype: jnp.dtype):
        """The norm multiplies by `offset` and the weight together."""
        weight = jnp.full((features,), 1.0 - offset, dtype)
        self.weight = nnx.Param(weight, partition=PartitionSpec(), parts=(features,))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        values = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + self.epsilon)
        if self.offset:  # weights near zero: a sum in bfloat16 would lose their digits
            return (values * scale * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return (values * scale).astype(x.dtype) * self.weight[...]
