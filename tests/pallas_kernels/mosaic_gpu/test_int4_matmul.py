"""Hopper's product with a weight in four bits in the interpreter, against float64. Cases take seconds."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import int4_matmul as kernel
from pallas_kernels.xla.matmul import unpacked
from tests.pallas_kernels.mosaic_gpu.interpreter import interpreted


def operands(rows, out_features, in_features, group):
    rng = np.random.default_rng(0)
    groups = out_features, in_features // group
    return (
        jnp.asarray(rng.normal(size=(rows, in_features)), jnp.bfloat16),
        jnp.asarray(rng.integers(0, 256, (out_features, in_features // 2)), jnp.uint8),
        jnp.asarray(rng.uniform(0.01, 1, groups), jnp.float32),
        jnp.asarray(rng.integers(-8, 9, groups), jnp.int8),
    )


@pytest.fixture
def product_that_the_interpreter_knows(monkeypatch):
    """It has no matrix instruction whose left operand lies in registers."""

    def multiply(weight, x_transposed):
        product = jnp.dot(weight, x_transposed[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the matrix instruction reads as copies write, by the asynchronous proxy; this does not
        return product

    monkeypatch.setattr(kernel, "multiply", multiply)


@pytest.mark.usefixtures("product_that_the_interpreter_knows")
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((3, 64, 256, 128), id="one-block-with-fewer-steps-than-stages"),
        pytest.param((9, 128, 1280, 256), id="blocks-that-share-a-row-unevenly-with-groups-of-two-steps"),
        pytest.param((70, 128, 768, 128), id="several-tiles-of-tokens-and-two-warpgroups"),
    ],
)
def test_interpreted_products_equal_float64_without_races(sizes, capsys):
    x, weight, scale, zero = operands(*sizes)
    assert kernel.refusal(x, scale) is None
    with interpreted(capsys):
        found = np.asarray(kernel.int4_matmul(x, weight, scale, zero), np.float64)
    meant = np.asarray(unpacked(weight, scale, zero, jnp.float32), np.float64)
    rows = np.asarray(x, np.float64)
    bound = 2.0**-22 * x.shape[1] * (np.abs(rows) @ np.abs(meant).T)
    assert (np.abs(found - rows @ meant.T) <= bound).all()


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((257, 64, 128, 128), "257 rows"), ((1, 96, 128, 128), "96 outputs"), ((1, 64, 256, 64), "groups are of 64")],
)
def test_what_it_does_not_take_is_told(sizes, told):
    x, _, scale, _ = operands(*sizes)
    assert told in kernel.refusal(x, scale)
    assert "rows are float32" in kernel.refusal(x.astype(jnp.float32), scale)
