"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864) and the ways to stretch them to longer texts."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. `kind` is one of `ROPE_KINDS`; the fields below it serve the kinds named."""

    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0  # the share of each head that is rotated: its first numbers
    kind: str = "default"
    factor: float = 1.0  # linear, dynamic, llama3, yarn, longrope
    original_max_position_embeddings: int = 8192  # dynamic, llama3, yarn, longrope: the length before the stretch
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = None  # yarn, longrope: cosines and sines are multiplied by it
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope
    longest: int = 0  # dynamic, longrope: the longest sequence that will be served

    def rotary_dim(self, head_dim: int) -> int:
        """How many numbers of each head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


def _default(rope: RopeConfig, dim: int) -> np.ndarray:
    return 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _linear(rope: RopeConfig, dim: int) -> np.ndarray:
    return _default(rope, dim) / rope.factor


def _dynamic(rope: RopeConfig, dim: int) -> np.ndarray:
    """A larger base for longer texts.

    The method as published takes a new base for every length. Keys that are kept would then be rotated by the bases of
    the lengths at which they were computed; here one base, that of the longest sequence, serves all.
    """
    stretch = max(rope.longest / rope.original_max_position_embeddings, 1.0)
    theta = rope.theta * (rope.factor * stretch - (rope.factor - 1.0)) ** (dim / (dim - 2))
    return _default(dataclasses.replace(rope, theta=theta), dim)


def _llama3(rope: RopeConfig, dim: int) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended."""
    frequencies = _default(rope, dim)
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / rope.factor)


def _yarn(rope: RopeConfig, dim: int) -> np.ndarray:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): a ramp over the dimensions from kept to stretched frequencies."""

    def dimension(rotations: float) -> float:
        """Which dimension rotates so often within the original length."""
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return _default(rope, dim) * (1.0 - stretched + stretched / rope.factor)


def _longrope(rope: RopeConfig, dim: int) -> np.ndarray:
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): a factor for every frequency, of two sets.

    The set is chosen by the longest sequence that will be served, not by each sequence's length: a sequence that grows
    past the original length would have to compute all of its keys anew.
    """
    long = rope.longest > rope.original_max_position_embeddings
    return _default(rope, dim) / np.asarray(rope.long_factor if long else rope.short_factor)


ROPE_KINDS: dict[str, Callable[[RopeConfig, int], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """By how much YaRN sharpens attention when positions are stretched by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by, so that scores grow by its square."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        original = rope.original_max_position_embeddings
        return 1.0 if rope.factor <= 1.0 else math.sqrt(1.0 + math.log(rope.factor) / math.log(original))
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of every rotated pair: float32 `[rotary_dim / 2]`."""
    return ROPE_KINDS[rope.kind](rope, rope.rotary_dim(head_dim)).astype(np.float32)


def rope_tables(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of `positions` `[...]`: two float32 arrays `[..., 1, rotary_dim / 2]`, ready to meet heads."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    factor = attention_factor(rope)
    # Without the barrier XLA fuses cosine and sine into every layer, and computes them anew for each head.
    return jax.lax.optimization_barrier((jnp.cos(angles) * factor, jnp.sin(angles) * factor))


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate the first `rotary_dim` numbers of each head of `x` `[..., heads, head_dim]`; float32 within, `x`'s dtype.

    The two numbers of a pair lie half of `rotary_dim` apart, or side by side if `interleaved`.
    """
    rotary_dim = 2 * cos.shape[-1]
    values, rest = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = jnp.split(values, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(pair, axis=-1).reshape(values.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
