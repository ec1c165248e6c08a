"""Random weights in a checkpoint's place: enough to measure speed, which does not depend on them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import model_class
from jaxserve.parallel.mesh import TENSOR, parameter_shardings


def random_weights(
    config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, *, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model of `config` on `mesh` as its layers initialise it; each device makes its own slices."""
    placed = config.over_tensor_axis(mesh.shape[TENSOR])
    graph, abstract = abstract_model(placed, dtype)

    def initialise() -> nnx.State:
        # XLA compiles this generator to one operation a weight, and the default one to dozens.
        return nnx.state(model_class(placed)(placed, dtype=dtype, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg"))))

    return graph, jax.jit(initialise, out_shardings=parameter_shardings(mesh, abstract))()
