"""Weights in eight bits: numbers of few bits with a float32 scale for every output, which the product is multiplied by.

Activations stay as they are. What is lost is each weight's rounding to one of 255 steps (`int8`), or to three bits of
mantissa (`fp8`, e4m3).
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp


class Numbers(NamedTuple):
    """A kind of numbers, and the largest of them that is used."""

    dtype: jnp.dtype
    largest: float


KINDS = {
    "int8": Numbers(jnp.dtype(jnp.int8), 127.0),
    "fp8": Numbers(jnp.dtype(jnp.float8_e4m3fn), 448.0),
}


def scales(weight: Any, kind: str, xp: ModuleType = jnp) -> Any:
    """float32 `[out]` for `weight` `[out, in]`: each row's largest number becomes the largest there is.

    `xp` is the array library of `weight`, numpy or jax.numpy. A row with NaN has it for its scale.
    """
    largest = xp.abs(weight.astype(xp.float32)).max(axis=-1)
    share = xp.float32(1 / KINDS[kind].largest)  # a division would become this product in compiled programs alone
    return xp.where(largest == 0, xp.float32(1), largest * share)


def rounded(weight: Any, scale: Any, kind: str, xp: ModuleType = jnp) -> Any:
    """`weight` `[out, in]` over `scale` `[out]` in numbers of `kind`."""
    numbers = weight.astype(xp.float32) / scale[..., None]
    return (xp.rint(numbers) if kind == "int8" else numbers).astype(KINDS[kind].dtype)
