"""Matrix products in plain XLA."""

import jax
import jax.numpy as jnp


def matmul_nk(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x` `[..., in]` times `weight` `[out, in]` transposed: float32 `[..., out]`.

    The weight stays two-dimensional: XLA copies a weight with split output axes on every call. One of eight bits is
    widened to `x`'s dtype: on a GPU within the product, on a CPU before it.
    """
    if weight.dtype.itemsize == 1:
        weight = weight.astype(x.dtype)
    # TF32 would cost a float32 model the exactness that it was chosen for.
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)


def matmul_nk_int4(x: jax.Array, weight: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """`matmul_nk` with a weight in four bits, which is unpacked before the product."""
    return matmul_nk(x, unpacked(weight, scale, zero, x.dtype))


def unpacked(weight: jax.Array, scale: jax.Array, zero: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A weight in four bits as `dtype` `[out, in]`: `(number - zero) * scale` of each group of neighbours in a row.

    `weight` uint8 `[out, in / 2]` has two numbers from -8 to 7 a byte, the first in its lower half; `scale` float32 and
    `zero` int8 are `[out, groups]`.
    """
    halves = jnp.stack([weight << 4, weight], axis=-1).astype(jnp.int8) >> 4
    numbers = halves.reshape(*scale.shape, -1) - zero[..., None]
    return (numbers * scale[..., None]).reshape(len(weight), -1).astype(dtype)
