"""Hopper's prefill attention as machine code: nothing spills in its loops, and products run beside the softmax."""

from functools import partial

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.mosaic_gpu.prefill import paged_prefill_attention

TOKENS, ROWS, PAGES = 2048, 8, 1024


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "tile_size", "dtype", "variant"),
    [
        (32, 8, 128, 64, 64, "bfloat16", {}),  # Llama 3 8B, Qwen3 8B
        (8, 8, 128, 128, 128, "bfloat16", {"window": 4096}),
        (64, 8, 64, 64, 64, "bfloat16", {"window": 128, "sinks": True}),
        (16, 8, 256, 64, 64, "bfloat16", {"window": 1024, "soft_cap": 50.0}),
        (32, 32, 80, 32, 128, "bfloat16", {}),
        (48, 8, 96, 128, 64, "float16", {}),
        (28, 4, 128, 16, 128, "bfloat16", {"window": 1000, "soft_cap": 50.0, "sinks": True}),
    ],
)
def test_no_spills_in_loops_and_no_product_in_another_s_way(
    heads, kv_heads, head_dim, page_size, tile_size, dtype, variant
):
    from tests.hopper.compiler import compile_for_h200, on_h200

    pages = ShapeDtypeStruct((PAGES, kv_heads, page_size, head_dim), dtype)
    sinks = ShapeDtypeStruct((heads,), jnp.float32) if variant.pop("sinks", False) else None
    arguments = (
        ShapeDtypeStruct((TOKENS, heads, head_dim), dtype),
        pages,
        pages,
        ShapeDtypeStruct((ROWS, 64), jnp.int32),
        ShapeDtypeStruct((4, TOKENS // tile_size + ROWS), jnp.int32),
        sinks,
    )
    attend = partial(paged_prefill_attention, tile_size=tile_size, scale=head_dim**-0.5, **variant)
    compiled = compile_for_h200(lambda *arrays: attend(*arrays[:5], sinks=arrays[5]), *on_h200(arguments))
    assert compiled.mosaic_calls == {"paged_prefill_attention": 1}
    (kernel,) = compiled.kernels
    # At head size 256 the address of the tiles and a scalar or two are put aside once, before the loops.
    assert kernel.spilled_bytes <= (16 if head_dim == 256 else 0)
    assert not kernel.serialized


@pytest.mark.parametrize(("tokens", "tile_size"), [(1, 64), (404, 64), (404, 128)])
def test_any_number_of_tokens_is_compiled(tokens, tile_size):
    from tests.hopper.compiler import compile_for_h200, on_h200

    pages = ShapeDtypeStruct((PAGES, 8, 64, 128), jnp.bfloat16)
    arguments = (
        ShapeDtypeStruct((tokens, 32, 128), jnp.bfloat16),
        pages,
        pages,
        ShapeDtypeStruct((ROWS, 64), jnp.int32),
        ShapeDtypeStruct((4, tokens // tile_size + ROWS), jnp.int32),
    )
    attend = partial(paged_prefill_attention, tile_size=tile_size, scale=128**-0.5)
    compiled = compile_for_h200(attend, *on_h200(arguments))
    assert compiled.mosaic_calls == {"paged_prefill_attention": 1}
