"""The whole programs that serve an 8B model, compiled for an H200: nothing copies the KV cache, and kernels attend."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.layers.linear import Linear
from jaxserve.layers.low_rank import LowRank, adaptable
from jaxserve.models.config import LayerKind, ModelConfig
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.kv_cache import KVCache
from jaxserve.runner.programs import DeviceState, Programs, SlotState
from jaxserve.runner.sampler import VocabState
from jaxserve.runner.step_batch import DecodeArrays, PrefillArrays, SamplingRows
from pallas_kernels import matmul
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.mosaic_gpu.refusals import refuse_prefill
from scripts.gpu.engine import count_graphs

RANK = 16  # of adapters
LAYERS, PAGES, PAGE_SIZE, SLOTS = 2, 2048, 64, 64  # of 36 layers, which are all alike
QWEN3_8B = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    layer_kinds=(LayerKind(),) * LAYERS,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    qk_norm=True,
)
CACHE = (PAGES, QWEN3_8B.num_kv_heads, PAGE_SIZE, QWEN3_8B.head_dim)
BUCKETS = Buckets.of(max_num_seqs=SLOTS, max_num_batched_tokens=2048, max_model_len=4096, page_size=PAGE_SIZE)

FULL_AND_SLIDING = (None, 1024)  # layers that share arrays, on pages of their own


def layout_of(windows: tuple[int | None, ...]) -> CacheLayout:
    sizes = {"page_size": PAGE_SIZE, "max_step_tokens": BUCKETS.prefill[-1].tokens, "max_model_len": 40960}
    return CacheLayout.of(windows, **sizes)


def abstract_state(layout: CacheLayout) -> DeviceState:
    array = jax.ShapeDtypeStruct
    pages = array(CACHE, jnp.bfloat16)
    slots = SlotState(
        array((SLOTS,), jnp.int32),
        array((len(layout.windows), SLOTS, BUCKETS.max_pages), jnp.int32),
        SamplingRows.empty(SLOTS),
        array((SLOTS,), jnp.int32),
        jax.eval_shape(lambda: VocabState.empty(SLOTS, QWEN3_8B.vocab_size)),
    )
    return DeviceState(KVCache((pages,) * layout.num_arrays, (pages,) * layout.num_arrays), slots)


def compiled_program(
    program: Callable[[Programs], Callable],
    layout: CacheLayout,
    batch: Any,
    *,
    quantization: str | None = None,
    adapters: int = 0,
) -> Any:
    from tests.hopper.compiler import MESH, compile_for_h200, on_h200

    kinds = tuple(LayerKind(window=layout.windows[place.group]) for place in layout.places)
    config = dataclasses.replace(QWEN3_8B, layer_kinds=kinds, quantization=quantization)
    graph, weights = abstract_model(config, jnp.bfloat16)
    layers = adaptable(nnx.merge(graph, weights)) if adapters else {}
    added = {place: low_rank_shapes(linear, adapters) for place, linear in layers.items()}
    leaves, tree = jax.tree.flatten((weights, added))
    backend = {"max_logprobs": 20, "max_decode_steps": 1, "attention_backend": "mosaic_gpu"}
    programs = Programs(graph, tree, adapters, config, layout, MESH, **backend)
    return compile_for_h200(program(programs), *on_h200((leaves, abstract_state(layout), batch)), donate=(1,))


def low_rank_shapes(linear: Linear, adapters: int) -> LowRank:
    out, into = linear.weight.shape
    width, blocks = adapters * RANK, out // sum(linear.parts)
    ups = [jax.ShapeDtypeStruct((blocks * part, width), jnp.bfloat16) for part in linear.parts]
    return LowRank(jax.ShapeDtypeStruct((len(linear.parts) * width, into), jnp.bfloat16), tuple(ups))


def assert_written_in_place(compiled: Any, layout: CacheLayout) -> None:
    shape = re.escape(f"bf16[{','.join(map(str, CACHE))}]")
    made_by = set(re.findall(rf"= {shape}\S* ([\w-]+)\(", compiled.text))
    assert "scatter" in made_by
    assert made_by <= {"parameter", "scatter", "fusion", "bitcast", "get-tuple-element"}
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(layout)))
    assert compiled.program.memory_analysis().alias_size_in_bytes == state_bytes


def test_decode_writes_the_cache_in_place_and_attends_in_kernels_only():
    windows = FULL_AND_SLIDING
    layout = layout_of(windows)
    batch = DecodeArrays.padding(SLOTS, max_num_seqs=SLOTS, groups=len(layout.windows))
    compiled = compiled_program(lambda programs: programs.decode, layout, batch)
    assert_written_in_place(compiled, layout)
    assert compiled.mosaic_calls == {"paged_decode_attention": LAYERS, "paged_decode_combine": LAYERS}
    assert not [kernel for kernel in compiled.kernels if kernel.spilled_bytes]
    schedules = [operands[-3:] for operands in compiled.operands("paged_decode_attention")]
    assert len(schedules) == LAYERS
    lists = dict(zip(windows, schedules, strict=True))
    assert [lists[window] for window in windows] == schedules, "the list of work is computed once"
    launched = count_graphs(compiled.thunks)
    assert (launched["graphs"], launched["outside"]) == (1, 0), "outside of a CUDA graph a branch waits for the host"


def test_prefill_writes_the_cache_in_place_and_attends_in_kernels_only():
    layout = layout_of(FULL_AND_SLIDING)
    bucket = BUCKETS.prefill[-1]
    shape = AttentionShape(32, 8, 128, 128, PAGE_SIZE, "bfloat16", tile_size=bucket.tile_size)
    if (refused := refuse_prefill(shape)) is not None:
        pytest.skip(refused)
    sizes = {"groups": len(layout.windows), "max_pages": BUCKETS.max_pages}
    batch = PrefillArrays.padding(bucket, max_num_seqs=SLOTS, **sizes)
    compiled = compiled_program(lambda programs: partial(programs.prefill, tile_size=bucket.tile_size), layout, batch)
    assert_written_in_place(compiled, layout)
    assert sum(compiled.mosaic_calls.values()) == LAYERS
    assert not [kernel for kernel in compiled.kernels if kernel.spilled_bytes]
    launched = count_graphs(compiled.thunks)
    assert (launched["graphs"], launched["outside"]) == (1, 0), "outside of a CUDA graph a branch waits for the host"


@pytest.mark.parametrize("adapters", [1, 8])
def test_adapters_are_part_of_the_one_graph_and_copy_no_weight(adapters: int):
    layout = layout_of((None,))
    batch = DecodeArrays.padding(SLOTS, max_num_seqs=SLOTS, groups=1)
    compiled = compiled_program(lambda programs: programs.decode, layout, batch, adapters=adapters)
    assert_written_in_place(compiled, layout)
    launched = count_graphs(compiled.thunks)
    assert (launched["graphs"], launched["outside"]) == (1, 0)
    entry = compiled.text[compiled.text.index("ENTRY ") :]
    width = adapters * RANK
    weights = re.findall(
        rf"= bf16\[(?:\d{{4,}},{width}|(?:{width}|{2 * width}|{3 * width}),\d{{4,}})\]\S* ([\w-]+)\(", entry
    )
    assert set(weights) == {"parameter"}
    assert len(weights) == 4 + 7  # of qkv, o, gate and up, down: one each, and one for each part


def test_weights_in_four_bits_are_multiplied_in_kernels_as_they_lie(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matmul, "is_hopper", lambda device: True)
    layout = layout_of((None,))
    batch = DecodeArrays.padding(SLOTS, max_num_seqs=SLOTS, groups=1)
    compiled = compiled_program(lambda programs: programs.decode, layout, batch, quantization="int4")
    assert compiled.mosaic_calls["int4_matmul"] == 4  # qkv, o, gate and up, down
    assert not [kernel for kernel in compiled.kernels if kernel.spilled_bytes or kernel.serialized]
    launched = compiled.text[compiled.text.index("ENTRY ") :]  # what is made here is written to memory
    weights = re.findall(r"= (\w+)\[(?:6144|4096|24576),(?:2048|4096|6144|12288)\]\S* ([\w-]+)\(", launched)
    assert sorted(weights) == [("s4", "bitcast")] * 4 + [("u8", "parameter")] * 4
    graphs = count_graphs(compiled.thunks)
    assert (graphs["graphs"], graphs["outside"]) == (1, 0)


@pytest.mark.parametrize(("quantization", "stored"), [(None, "bf16"), ("int8", "s8"), ("fp8", "f8e4m3fn")])
def test_weights_in_eight_bits_are_widened_within_the_products(quantization: str | None, stored: str):
    layout = layout_of((None,))
    batch = DecodeArrays.padding(SLOTS, max_num_seqs=SLOTS, groups=1)
    compiled = compiled_program(lambda programs: programs.decode, layout, batch, quantization=quantization)
    launched = compiled.text[compiled.text.index("ENTRY ") :]  # what is made here is written to memory
    weights = re.findall(r"= (\w+)\[(?:6144,4096|4096,4096|24576,4096|4096,12288)\]\S* ([\w-]+)\(", launched)
    assert set(weights) == {(stored, "parameter")}
    assert len(weights) == 4
