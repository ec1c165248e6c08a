"""What attention's kernels share: base-2 softmax in the register layout of a matrix instruction."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite, so that no difference of two is NaN
FLOOR = -1e29  # where a running maximum starts: what is masked lies so far below it that its weight is 0, not 1
MATRIX = plgpu.Layout.WGMMA  # what a warpgroup's matrix instruction accumulates in
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """Float32 `[rows, columns]` or `[columns]` in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), MATRIX if len(shape) == 2 else BY_COLUMN)


def for_each_row(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[columns]` repeated for every row of `shape`."""
    return lax.broadcast_in_dim(values, shape, [1])
