"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019, arXiv:1910.07467), computed in float32."""

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((features,), dtype), partition=PartitionSpec(), parts=(features,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        values = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + self.epsilon)
        return (values * scale).astype(x.dtype) * self.weight[...]
