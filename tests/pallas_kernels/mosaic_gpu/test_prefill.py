"""Hopper's prefill attention in the interpreter, against the float64 reference. A case takes seconds: they are few."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import prefill
from tests.pallas_kernels.mosaic_gpu.interpreter import interpreted
from tests.pallas_kernels.reference import check_prefill

PLAIN = {"window": None, "soft_cap": None, "with_sinks": False, "seed": 0}


@pytest.fixture
def products_that_the_interpreter_knows(monkeypatch):
    """It has no matrix instruction whose left operand lies in registers, and none that runs beside anything else."""

    def accumulate(weights, v, accumulated):
        product = jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the matrix instruction reads as copies write, by the asynchronous proxy; this does not
        return accumulated + product

    def multiply_both(q, k_transposed, weights, v, accumulated, started, softmax, carry):
        scores = prefill.multiply(q, k_transposed)
        started()
        return (accumulate(weights, v, accumulated), *softmax(scores))

    monkeypatch.setattr(prefill, "accumulate", accumulate)
    monkeypatch.setattr(prefill, "multiply_both", multiply_both)


@pytest.mark.usefixtures("products_that_the_interpreter_knows")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            # The second tile of the first row has three tokens, all of one warpgroup; its end is inside a page.
            {"rows": [(60, 131), (0, 1)], "tile_size": 128, "kv_heads": 1, "group": 2, "head_dim": 64, "page_size": 16},
            id="tiles-of-one-head-with-two-masked-edges",
        ),
        pytest.param(
            {"rows": [(9, 40), (490, 64)], "tile_size": 64, "kv_heads": 2, "group": 3, "head_dim": 80, "page_size": 32}
            | {"window": 300, "soft_cap": 2.0, "with_sinks": True},
            id="everything-at-once-with-a-head-that-has-no-other-beside-it",
        ),
        pytest.param(
            {"rows": [(120, 20)], "tile_size": 64, "kv_heads": 1, "group": 1, "head_dim": 256, "page_size": 128}
            | {"dtype": "float16", "with_sinks": True},
            id="half-pages-in-float16-and-fewer-tokens-than-a-tile",
        ),
    ],
)
def test_interpreted_prefill_equals_float64_attention_without_races(case, capsys):
    with interpreted(capsys):
        check_prefill(prefill.paged_prefill_attention, **({"dtype": "bfloat16"} | PLAIN | case))
