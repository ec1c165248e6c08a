"""Random weights in a checkpoint's place: enough to measure speed, which does not depend on them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.layers.linear import quantised
from jaxserve.layers.quantisation import INT4
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import TENSOR, parameter_shardings

_DEVIATION = 0.02
_LARGEST = 127  # of numbers in eight bits, which are drawn evenly
_LARGEST_INT4 = 8


def random_weights(
    config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, *, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model of `config` on `mesh`: normal numbers for matrices, ones for vectors; each device makes its own slices.

    One parameter after the other, by a program for each shape: one program for all takes XLA minutes.
    """
    graph, abstract = abstract_model(config.over_tensor_axis(mesh.shape[TENSOR]), dtype)
    shardings = dict(nnx.to_flat_state(parameter_shardings(mesh, abstract)))
    parameters = nnx.to_flat_state(abstract)
    keys = jax.random.split(jax.random.key(seed), len(parameters))
    made = [
        (path, variable.replace(_draw(variable.shape, variable.dtype, shardings[path], _constant(variable))(key)))
        for (path, variable), key in zip(parameters, keys, strict=True)
    ]
    return graph, nnx.from_flat_state(made)


def _constant(parameter: nnx.Variable) -> float | None:
    """What all numbers of `parameter` are; None if they are drawn."""
    own = quantised(parameter)
    if own is None or own.part == "weight":
        return None
    return 0 if own.part == "zero" else _DEVIATION / ((_LARGEST_INT4 if own.kind == INT4 else _LARGEST) * 3**-0.5)


@functools.cache
def _draw(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, constant: float | None
) -> Callable[[jax.Array], jax.Array]:
    """A compiled function from a key to an array on the mesh."""

    def draw(key: jax.Array) -> jax.Array:
        if constant is not None:
            return jnp.full(shape, constant, dtype)
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        if dtype.itemsize == 1:
            return jax.random.randint(key, shape, -_LARGEST, _LARGEST + 1).astype(dtype)
        return (_DEVIATION * jax.random.normal(key, shape)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
