"""Hopper's product with a weight in four bits as machine code."""

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.mosaic_gpu.int4_matmul import int4_matmul, refusal


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "most_registers"),
    [(1, 4096, 4096, 80), (16, 6144, 4096, 96), (32, 4096, 12288, 128), (64, 24576, 4096, 128), (200, 192, 640, 128)],
)
def test_no_spills_no_copies_and_registers_for_two_blocks_a_multiprocessor(
    rows, out_features, in_features, most_registers
):
    from tests.hopper.compiler import compile_for_h200, on_h200

    groups = out_features, in_features // 128
    x = ShapeDtypeStruct((rows, in_features), jnp.bfloat16)
    weight = ShapeDtypeStruct((out_features, in_features // 2), jnp.uint8)
    scale, zero = ShapeDtypeStruct(groups, jnp.float32), ShapeDtypeStruct(groups, jnp.int8)
    assert refusal(x, scale) is None
    compiled = compile_for_h200(int4_matmul, *on_h200((x, weight, scale, zero)))
    assert compiled.mosaic_calls == {"int4_matmul": 1}
    (kernel,) = compiled.kernels
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= most_registers
    assert not kernel.serialized
    assert f"s4[{out_features},{in_features}]{{1,0:E(4)}} bitcast(" in compiled.text, "the weight's bytes as they lie"
