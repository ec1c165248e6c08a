"""Hopper's grouped matrix product as machine code, for all blocks of its table."""

from functools import partial

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.mosaic_gpu.block_sizes import GroupedMatmulBlocks
from pallas_kernels.mosaic_gpu.grouped_matmul import grouped_matmul, refusal

GROUPS = 128  # Qwen3-30B-A3B: 768 features of an expert, gate and up in one weight


@pytest.mark.parametrize(
    ("rows_a_group", "most_registers", "blocks"),
    [
        *((1, 80, None), (16, 80, None), (32, 80, None), (64, 80, None), (128, 168, None), (512, 168, None)),
        (512, 255, GroupedMatmulBlocks(tokens=256, out=64, stages=3)),  # one compute warpgroup
    ],
)
def test_no_spills_and_registers_for_all_blocks_of_a_multiprocessor(rows_a_group, most_registers, blocks):
    """Up to 64 tokens two blocks of 384 threads are meant to share a multiprocessor, with 80 registers a thread."""
    from tests.hopper.compiler import compile_for_h200, on_h200

    arguments = (
        ShapeDtypeStruct((rows_a_group * GROUPS, 2048), jnp.bfloat16),
        ShapeDtypeStruct((GROUPS, 1536, 2048), jnp.bfloat16),
        ShapeDtypeStruct((GROUPS,), jnp.int32),
    )
    compiled = compile_for_h200(partial(grouped_matmul, blocks=blocks), *on_h200(arguments))
    assert compiled.mosaic_calls == {"grouped_matmul": 1}
    (kernel,) = compiled.kernels
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= most_registers
    assert not kernel.serialized


@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"), [(1, 384, 256), (300, 64, 320), (9, 24, 16), (8, 64, 40)]
)
def test_any_number_of_rows_and_every_size_that_is_not_refused_is_compiled(tokens, out_features, in_features):
    from tests.hopper.compiler import compile_for_h200, on_h200

    x = ShapeDtypeStruct((tokens, in_features), jnp.bfloat16)
    weights = ShapeDtypeStruct((8, out_features, in_features), jnp.bfloat16)
    assert refusal(x, weights) is None
    compiled = compile_for_h200(grouped_matmul, *on_h200((x, weights, ShapeDtypeStruct((8,), jnp.int32))))
    assert compiled.mosaic_calls == {"grouped_matmul": 1}
