"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864), in the half-split form of HuggingFace checkpoints."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `kind` is one of `ROPE_KINDS`; the other fields serve the kinds named."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0  # linear, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # llama3

    SCALING_FIELDS: ClassVar = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _default(rope: RopeConfig, head_dim: int) -> np.ndarray:
    return 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _linear(rope: RopeConfig, head_dim: int) -> np.ndarray:
    return _default(rope, head_dim) / rope.factor


def _llama3(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended."""
    frequencies = _default(rope, head_dim)
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / rope.factor)


ROPE_KINDS: dict[str, Callable[[RopeConfig, int], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
}


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of every rotated pair: float32 `[head_dim / 2]`."""
    return ROPE_KINDS[rope.kind](rope, head_dim).astype(np.float32)


def rope_tables(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of `positions` `[...]`: two float32 arrays `[..., 1, head_dim / 2]`, ready to meet heads."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    # Without the barrier XLA fuses cosine and sine into every layer, and computes them anew for each head.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate `x` `[..., heads, head_dim]` in float32; the result has `x`'s dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
