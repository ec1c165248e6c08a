"""Hopper's decode attention as machine code: it compiles, spills nothing, and its blocks fit as they are planned."""

from functools import partial

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.mosaic_gpu.decode import blocks_and_stages, paged_decode_attention

REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # of a block of the attention kernel
ROWS, PAGES = 64, 1024


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "queries", "dtype", "variant"),
    [
        (32, 8, 128, 64, 1, "bfloat16", {}),  # Llama 3 8B, Qwen3 8B
        (8, 1, 128, 64, 1, "bfloat16", {}),  # a 70B model's share on each of eight devices
        (32, 32, 128, 16, 1, "float16", {}),  # a head for each query head
        (64, 8, 64, 64, 1, "bfloat16", {"window": 128, "sinks": True}),
        (16, 8, 256, 64, 1, "bfloat16", {"window": 1024, "soft_cap": 50.0}),
        (32, 8, 80, 32, 1, "bfloat16", {}),
        (48, 8, 96, 128, 1, "float16", {}),
        (32, 2, 128, 128, 1, "bfloat16", {}),  # 16 query heads for each KV head
        (32, 8, 128, 64, 8, "bfloat16", {"window": 4096, "soft_cap": 30.0, "sinks": True}),
        (32, 8, 256, 64, 8, "bfloat16", {"soft_cap": 50.0}),
        (16, 1, 128, 64, 8, "bfloat16", {}),  # 128 columns, in four passes
    ],
)
def test_no_spills_and_registers_for_all_blocks_of_a_multiprocessor(
    heads, kv_heads, head_dim, page_size, queries, dtype, variant
):
    from tests.hopper.compiler import compile_for_h200, on_h200

    pages = ShapeDtypeStruct((PAGES, kv_heads, page_size, head_dim), dtype)
    sinks = ShapeDtypeStruct((heads,), jnp.float32) if variant.pop("sinks", False) else None
    arguments = (
        ShapeDtypeStruct((ROWS, queries, heads, head_dim), dtype),
        pages,
        pages,
        ShapeDtypeStruct((ROWS, 64), jnp.int32),
        ShapeDtypeStruct((ROWS,), jnp.int32),
        sinks,
    )
    attend = partial(paged_decode_attention, scale=head_dim**-0.5, **variant)
    compiled = compile_for_h200(lambda *arrays: attend(*arrays[:5], sinks=arrays[5]), *on_h200(arguments))
    assert compiled.mosaic_calls == {"paged_decode_attention": 1, "paged_decode_combine": 1}
    attention, combine = compiled.kernels
    assert attention.spilled_bytes == combine.spilled_bytes == 0
    width = min(-(-queries * heads // kv_heads // 8) * 8, 32)
    blocks, stages = blocks_and_stages(width, head_dim, head_dim)
    assert attention.registers * THREADS * blocks <= REGISTERS
    in_flight = blocks * (stages - 1) * 64 * 2 * 2 * head_dim
    assert in_flight >= 64 * 1024, "bytes on their way to each multiprocessor while a tile is computed"
