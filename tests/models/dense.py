"""Models run without the engine: loaded on simulated devices, over a whole prompt at once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.checkpoint.huggingface import load_weights, read_config
from jaxserve.models.registry import model_config
from jaxserve.parallel.mesh import make_mesh
from tests.models.cases import MAX_MODEL_LEN


def load(
    directory: Path, devices: int = 1, *, served: int = MAX_MODEL_LEN, quantization: str | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    config = model_config(read_config(directory)).served_up_to(served)
    config = dataclasses.replace(config, quantization=quantization or config.quantization)
    return load_weights(directory, config, make_mesh(devices), jnp.dtype(jnp.float32))


def logits(model: tuple[nnx.GraphDef, nnx.State], token_ids: list[int]) -> np.ndarray:
    """Float32 logits `[tokens, vocab]` after each token, with plain causal attention."""
    return batch_logits(model, [token_ids])[0]


def batch_logits(model: tuple[nnx.GraphDef, nnx.State], rows: list[list[int]]) -> list[np.ndarray]:
    """Of each row, float32 logits `[tokens, vocab]` after each token, with plain causal attention."""
    return _run(model, rows, lambda decoder, hidden: decoder.logits(hidden))


def hidden_states(model: tuple[nnx.GraphDef, nnx.State], token_ids: list[int]) -> np.ndarray:
    """Float32 `[tokens, hidden]`, after the last norm, with plain causal attention."""
    return _run(model, [token_ids], lambda decoder, hidden: hidden)[0]


def _run(model: tuple[nnx.GraphDef, nnx.State], rows: list[list[int]], read: Callable) -> list[np.ndarray]:
    graph, state = model

    @jax.jit
    def run(state: nnx.State, tokens: jax.Array) -> jax.Array:
        decoder = nnx.merge(graph, state)
        return read(decoder, decoder(tokens, jnp.arange(tokens.shape[1])[None], _attend))

    longest = max(len(row) for row in rows)
    padded = jnp.asarray([row + [0] * (longest - len(row)) for row in rows], jnp.int32)
    with jax.default_matmul_precision("highest"):  # a GPU would use TF32 in the attention
        found = np.asarray(run(state, padded))
    return [found[index, : len(row)] for index, row in enumerate(rows)]


def _attend(
    layer: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    position = jnp.arange(q.shape[1])
    visible = position[:, None] >= position
    if window is not None:
        visible &= position[:, None] - position < window
    k, v = (jnp.repeat(heads, q.shape[2] // heads.shape[2], axis=2) for heads in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None], scores.shape[:-1])[..., None]], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : len(position)]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference relative to the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
