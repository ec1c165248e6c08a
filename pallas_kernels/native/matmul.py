"""Products of bf16 rows on the CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.native.library import target
from pallas_kernels.xla import matmul as xla

WEIGHTS = (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)


@jax.custom_jvp
def matmul_nk(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x` bf16 `[rows, in]` times `weight`, one of `WEIGHTS`, `[out, in]` transposed: float32 `[rows, out]`."""
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(target("matmul_nk"), result, vmap_method="sequential")(x, weight)


@matmul_nk.defjvp
def _matmul_nk_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple:
    return jax.jvp(xla.matmul_nk, primals, tangents)


@jax.custom_jvp
def matmul_nk_int4(x: jax.Array, weight: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """`x` bf16 `[rows, in]` times a weight as `xla.matmul.unpacked` has it, transposed: float32 `[rows, out]`."""
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(target("matmul_nk_int4"), result, vmap_method="sequential")(x, weight, scale, zero)


@matmul_nk_int4.defjvp
def _matmul_nk_int4_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple:
    return jax.jvp(xla.matmul_nk_int4, primals, tangents)
