"""Products with weights that are split over a mesh: on CPUs each device multiplies its part in the native kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.layers.linear import split_matmul_nk
from jaxserve.parallel.mesh import TENSOR, make_mesh
from pallas_kernels.native import library

CALL = library.target("matmul_nk")
SPLITS = {
    "outputs": PartitionSpec(TENSOR, None),
    "inputs": PartitionSpec(None, TENSOR),
    "nothing": PartitionSpec(),
}


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float32])
def test_a_split_product_equals_float64(kind: type, split: str, devices: int) -> None:
    random = np.random.default_rng(devices)
    dtype = jnp.float32 if kind is jnp.float32 else jnp.bfloat16
    x = random.standard_normal((3, 5, 88)).astype(dtype)
    weight = (8 * random.standard_normal((36, 88))).astype(kind)
    mesh = make_mesh(devices)
    placed = jax.device_put(weight, NamedSharding(mesh, SPLITS[split]))

    @jax.jit
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return split_matmul_nk(x, weight, SPLITS[split])

    with jax.set_mesh(mesh):
        found, text = product(x, placed), product.lower(x, placed).as_text()
    assert found.dtype == jnp.float32
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    scale = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    assert (np.abs(np.asarray(found) - expected) <= 1e-5 * scale).all()
    assert (CALL in text) == (library.available() and kind is not jnp.float32)


def test_without_a_mesh_in_context_a_split_weight_is_left_to_xla() -> None:
    weight = jax.device_put(np.ones((8, 16), jnp.bfloat16), NamedSharding(make_mesh(2), SPLITS["outputs"]))
    x = np.ones((2, 16), jnp.bfloat16)
    product = jax.jit(lambda x, weight: split_matmul_nk(x, weight, SPLITS["outputs"]))
    assert CALL not in product.lower(x, weight).as_text()
    np.testing.assert_array_equal(product(x, weight), np.full((2, 8), 16))
