"""The products of all layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.devices import platform_of
from pallas_kernels.implementations import is_hopper, log_once
from pallas_kernels.native import library
from pallas_kernels.native import matmul as native
from pallas_kernels.xla import matmul as xla


def products_run_natively(dtype: jnp.dtype, platform: str) -> bool:
    """Whether products of rows in `dtype` on devices of that platform run in the native kernel."""
    return dtype == jnp.bfloat16 and platform == "cpu" and library.available()


def runs_in_a_kernel(dtype: jnp.dtype, weight: jnp.dtype, platform: str) -> bool:
    """Whether products of rows in `dtype` with a weight of such numbers may be a kernel's, which XLA cannot split."""
    return products_run_natively(dtype, platform) or (platform == "gpu" and weight == jnp.uint8)


def matmul_nk(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x` `[..., in]` times `weight` `[out, in]` transposed: float32 `[..., out]`.

    The weight is of `x`'s dtype, or of eight bits, int8 or float8_e4m3fn, all of whose numbers `x`'s dtype holds.
    """
    if x.dtype == jnp.bfloat16 and weight.dtype in native.WEIGHTS and library.serves(weight):
        y = native.matmul_nk(x.reshape(-1, x.shape[-1]), weight)
        return y.reshape(*x.shape[:-1], -1)
    return xla.matmul_nk(x, weight)


def matmul_nk_int4(x: jax.Array, weight: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """`x` `[..., in]` times a weight in four bits, transposed: float32 `[..., out]`.

    `weight` uint8 `[out, in / 2]` has two numbers from -8 to 7 a byte, the first in its lower half. Each means
    `(number - zero) * scale` with the float32 `scale` and the int8 `zero` of its group, `[out, groups]` both; a group
    is `in / groups` neighbours in a row. What it means is rounded to `x`'s dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    run: Callable[..., jax.Array]
    if x.dtype == jnp.bfloat16 and library.serves(weight):
        run = native.matmul_nk_int4
    elif platform_of(weight) == "gpu" and is_hopper(jax.devices()[0]) and (kernel := _int4_kernel(rows, scale)):
        run = kernel
    else:
        run = xla.matmul_nk_int4
    return run(rows, weight, scale, zero).reshape(*x.shape[:-1], -1)


def _int4_kernel(x: jax.Array, scale: jax.Array) -> Callable[..., jax.Array] | None:
    """Hopper's, if it takes the operands."""
    from pallas_kernels.mosaic_gpu import int4_matmul as mosaic_gpu  # on demand: it brings Pallas

    refused = mosaic_gpu.refusal(x, scale)
    if refused is not None and len(x) <= mosaic_gpu.MAX_ROWS:
        log_once(f"products with weights in four bits run in XLA, which unpacks them in each step: {refused}")
    return mosaic_gpu.int4_matmul if refused is None else None
