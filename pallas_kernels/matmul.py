"""The products of all layers."""

import jax
import jax.numpy as jnp

from pallas_kernels.native import library
from pallas_kernels.native import matmul as native
from pallas_kernels.xla import matmul as xla


def matmul_nk(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x` `[..., in]` times `weight` `[out, in]` transposed: float32 `[..., out]`.

    bf16 on one CPU device runs in the native kernel. XLA's partitioner cannot split that over several devices.
    """
    if x.dtype == weight.dtype == jnp.bfloat16 and library.serves(weight):
        y = native.matmul_nk(x.reshape(-1, x.shape[-1]), weight)
        return y.reshape(*x.shape[:-1], -1)
    return xla.matmul_nk(x, weight)
