"""Hopper's grouped matrix product as machine code, for all blocks of its table."""

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.mosaic_gpu.grouped_matmul import grouped_matmul

GROUPS = 128  # Qwen3-30B-A3B: 768 features of an expert, gate and up in one weight


@pytest.mark.parametrize(
    ("rows_a_group", "most_registers"), [(1, 80), (16, 80), (32, 80), (64, 80), (128, 168), (512, 168)]
)
def test_no_spills_and_registers_for_all_blocks_of_a_multiprocessor(rows_a_group, most_registers):
    """Up to 64 tokens two blocks of 384 threads are meant to share a multiprocessor, with 80 registers a thread."""
    from tests.hopper.compiler import compile_for_h200, on_h200

    arguments = (
        ShapeDtypeStruct((rows_a_group * GROUPS, 2048), jnp.bfloat16),
        ShapeDtypeStruct((GROUPS, 1536, 2048), jnp.bfloat16),
        ShapeDtypeStruct((GROUPS,), jnp.int32),
    )
    compiled = compile_for_h200(grouped_matmul, *on_h200(arguments))
    assert compiled.mosaic_calls == {"grouped_matmul": 1}
    (kernel,) = compiled.kernels
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= most_registers
    assert not kernel.serialized
