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
