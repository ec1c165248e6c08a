"""Weights in numbers of few bits, and the scales and zeros that they are kept with. Activations stay as they are.

In eight bits every output has a float32 scale, which the product is multiplied by; what is lost is each weight's
rounding to one of 255 steps (`int8`), or to three bits of mantissa (`fp8`, e4m3). In four bits (`int4`) every group of
neighbours in a row has a scale and a zero: a weight is `(number - zero) * scale`, one of 16 steps from the group's
least to its largest.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp


class Numbers(NamedTuple):
    """A kind of numbers, and the largest of them that is used."""

    dtype: jnp.dtype
    largest: float


EIGHT_BITS = {
    "int8": Numbers(jnp.dtype(jnp.int8), 127.0),
    "fp8": Numbers(jnp.dtype(jnp.float8_e4m3fn), 448.0),
}
INT4 = "int4"
KINDS = (*EIGHT_BITS, INT4)

_STEPS, _LEAST = 15, -8  # of four bits
_GROUPS = (128, 64, 32)


class Quantised(NamedTuple):
    """What a parameter is of a quantised weight, and in `int4` how many neighbours in a row have one scale.

    Each device of a mesh holds whole groups: where it cannot, several that follow each other have the same scale.
    """

    kind: str
    part: str  # weight, scale or zero
    group: int = 0
    repeats: int = 1  # of a group's scale and zero


def usual_group(in_features: int) -> int:
    """How many neighbours have one scale in `int4`, if nothing says otherwise."""
    return next((size for size in _GROUPS if in_features % size == 0), in_features)


def made(weight: Any, own: Quantised, xp: ModuleType = jnp) -> Any:
    """The part `own` of `weight` `[out, in]`, whose numbers are rounded to the nearest.

    Of eight bits the weight is `[out, in]`, the scale float32 `[out]`. Of `int4` they are uint8 `[out, in / 2]`, two
    numbers from -8 to 7 a byte of which the first is in the lower half, and float32 and int8 `[out, groups]`. `xp` is
    the array library of `weight`, numpy or jax.numpy. What has NaN has it for its scale.
    """
    weight = weight.astype(xp.float32)
    if own.kind != INT4:
        scale = _scales(weight, own.kind, xp)
        return scale if own.part == "scale" else _rounded(weight, scale, own.kind, xp)
    groups = weight.reshape(*weight.shape[:-1], -1, own.group)
    least, most = xp.minimum(groups.min(-1), 0), xp.maximum(groups.max(-1), 0)
    span = most - least
    scale = xp.where(span == 0, xp.float32(1), span * xp.float32(1 / _STEPS))
    zero = xp.rint(-least / scale)
    if own.part == "scale":
        return xp.repeat(scale, own.repeats, -1)
    if own.part == "zero":
        return xp.repeat((zero + _LEAST).astype(xp.int8), own.repeats, -1)
    numbers = xp.clip(xp.rint(groups / scale[..., None]) + zero[..., None], 0, _STEPS) + _LEAST
    return packed(numbers.astype(xp.int8).reshape(weight.shape), xp)


def packed(numbers: Any, xp: ModuleType = jnp) -> Any:
    """Integers of which the lowest four bits count, `[..., in]`, as uint8 `[..., in / 2]`; see `made`."""
    halves = numbers.astype(xp.uint8)
    return (halves[..., ::2] & 15) | (halves[..., 1::2] << 4)


def _scales(weight: Any, kind: str, xp: ModuleType) -> Any:
    """Each row's largest number becomes the largest there is."""
    largest = xp.abs(weight).max(axis=-1)
    share = xp.float32(1 / EIGHT_BITS[kind].largest)  # a division would become this product in compiled programs alone
    return xp.where(largest == 0, xp.float32(1), largest * share)


def _rounded(weight: Any, scale: Any, kind: str, xp: ModuleType) -> Any:
    numbers = weight / scale[..., None]
    return (xp.rint(numbers) if kind == "int8" else numbers).astype(EIGHT_BITS[kind].dtype)
