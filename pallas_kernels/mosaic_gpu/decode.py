"""Paged decode attention for Hopper, compiled for the H200 and checked in the interpreter; no GPU has timed it yet.

**What bounds it.** A step reads every visible key and value once, 2 x 2 bytes x head_dim a position, and computes
4 x head_dim x queries x group flops on them: at 8 query columns, 8 flops a byte, where the H200 has 206 (989 TFLOP/s of
bf16 to 4.8 TB/s). Only bytes in flight count. Little's law asks for 4.8 TB/s x 1 microsecond / 132 = 36 KiB on each
multiprocessor; this keeps 128 KiB there at head size 128 in bf16.

**How it goes.** (Flash-decoding: Dao, Haziza, Massa and Sizov, 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html,
with parts of equal size as in Stream-K: Osama et al., 2023, arXiv:2301.03598.) Two blocks for each multiprocessor stay
for the whole kernel; `make_schedule` gives each the same number of tiles of 64 tokens, whatever the rows' lengths, so
that one row of 131,072 tokens keeps all of them as busy as 64 of 4,096 do. (One block, with twice the memory, at head
size 256 and where more than 16 query columns take too many registers.) In a block one warpgroup copies (one bulk
tensor copy a page, or half a page of 128; the page index comes from memory) and one computes. Operands are swapped: the
tile of keys is the left matrix, of 64 rows, and the few queries, with all heads of their group, are its columns, in
eights. The softmax runs down the columns, in base 2. What a block finds for a row goes to a place of its own, and
`combine` makes the output of it.

**Shared memory**, head size 128: 3 stages x (16 KiB of keys + 16 KiB of values) + 2 x 2 KiB of queries + 1 KiB of
weights = 101 KiB a block. Both blocks hold 6 tiles, 192 KiB, of which two are being computed on. Between two copies of
a multiprocessor's tiles lie 0.9 microseconds, 1,600 cycles, in which one of two blocks computes one tile of 64 x 128.

**Head sizes** that are no multiple of 64: the contraction over keys needs multiples of 16 only, at a narrower swizzle.
Values stand transposed, as 64 rows of output for each matrix instruction, so they are padded to a multiple of 64 in
shared memory: the copy reaches beyond the page's last column, where the hardware fills in zeros without reading memory.

**What is stale.** Positions from a row's length on may hold another sequence's leftovers, even NaN, which a weight of
zero does not silence; the last tile's values are overwritten with zeros there before they are used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.decode_combine import combine
from pallas_kernels.mosaic_gpu.decode_schedule import MULTIPROCESSORS, TILE, Schedule, make_schedule
from pallas_kernels.mosaic_gpu.softmax import FLOOR, LOG2_E, MASKED, MATRIX, filled, for_each_row

_SHARED_BYTES = 227 * 1024  # that the blocks of one multiprocessor may take, 1 KiB for each included


# One function of its own in a program, so that what all layers share is lowered and compiled once.
@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "blocks"))
def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    blocks: int | None = None,
) -> jax.Array:
    """`pallas_kernels.xla.paged_attention.paged_decode_attention` for what `refuse_decode` has nothing against.

    `blocks` thread blocks share the work: as many as the device holds if it is left out.
    """
    batch, queries, heads, _ = q.shape
    kv_heads, page_size, value_dim = v_pages.shape[1:]
    group, columns = heads // kv_heads, queries * (heads // kv_heads)
    # More columns than the registers of one warpgroup hold are walked in several passes, like heads of their own.
    width = min(-(-columns // 8) * 8, 32)
    passes = -(-columns // width)

    def to_columns(array_bqhx: jax.Array) -> jax.Array:
        """`[batch, queries, heads, x]` to `[batch, kv_heads * passes, width, x]`, filled up with zeros."""
        rows, _, _, size = array_bqhx.shape
        by_kv_head = array_bqhx.reshape(rows, queries, kv_heads, group, size).transpose(0, 2, 1, 3, 4)
        flat = by_kv_head.reshape(rows, kv_heads, columns, size)
        padded = jnp.pad(flat, ((0, 0), (0, 0), (0, passes * width - columns), (0, 0)))
        return padded.reshape(rows, kv_heads * passes, width, size)

    schedule = make_schedule(
        lengths,
        heads=kv_heads * passes,
        queries=queries,
        window=window,
        unit=min(page_size, TILE),
        blocks=blocks or blocks_and_stages(width, q.shape[-1], value_dim)[0] * _multiprocessors(),
    )
    values, logsums = _attend(
        to_columns(q),
        k_pages,
        v_pages,
        page_table,
        schedule,
        queries=queries,
        group=group,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32) * LOG2_E, (1, queries, heads))
        sinks = to_columns(sinks[..., None])[0, :, :, 0]
    rows_out = columns if passes == 1 else width
    out = combine(values, logsums, schedule, sinks, batch=batch, columns=rows_out, dtype=q.dtype)
    out = out.reshape(batch, kv_heads, passes * rows_out, -1)[:, :, :columns, :value_dim]
    out = out.reshape(batch, kv_heads, queries, group, value_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, queries, heads, value_dim)


def blocks_and_stages(width: int, head_dim: int, value_dim: int) -> tuple[int, int]:
    """Blocks that share a multiprocessor, and tiles that each holds in shared memory.

    Two, unless that leaves fewer than three tiles to each, or a thread of one needs more than half of its registers.
    """
    stage_bytes = 2 * TILE * (head_dim + -(-value_dim // 64) * 64)
    other_bytes = 2048 + 2 * width * (2 * head_dim + TILE)  # the system's and barriers; queries and weights
    for blocks in (2, 1):
        stages = (_SHARED_BYTES // blocks - other_bytes) // stage_bytes
        if blocks == 1 or (stages >= 3 and width <= 16):
            break
    return blocks, min(stages, 8)


def _multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS


def _swizzled(columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How a 16-bit matrix of so many columns lies in shared memory for copies and matrix instructions."""
    swizzle = plgpu.find_swizzle(columns * 16)
    # mypy takes the classes for abstract, after a method of their protocol that has no body.
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def _attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    schedule: Schedule,
    *,
    queries: int,
    group: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """What each block finds for each of its pairs, in the pair's place.

    `q` `[batch, kv_heads * passes, width, head_dim]`. Returns float32 `[places, value_dim, width]`, the weighted means
    of values with value_dim padded to 64, and float32 `[places, width]`, the base-2 logarithms of the weights' sums.
    """
    batch, heads, width, head_dim = q.shape
    kv_heads, page_size, value_dim = v_pages.shape[1:]
    passes = heads // kv_heads
    dtype = k_pages.dtype
    blocks = schedule.pairs.shape[1]
    unit = min(page_size, TILE)
    units = TILE // unit  # that make up a tile
    units_per_page = page_size // unit
    padded_dim = -(-value_dim // 64) * 64
    _, stages = blocks_and_stages(width, head_dim, value_dim)

    def body(*refs: Any) -> None:
        q_g, k_g, v_g, table_g, rows_g, pairs_g, sizes_g, values_g, logsums_g, *scratch = refs
        q_s, k_s, v_s, weights_s, q_full, k_full, v_full, q_free, k_free, v_free = scratch
        block = lax.axis_index("block")
        start = block * sizes_g[1]

        def for_each_pair(work: Callable, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """`work` on the block's tiles of each of its pairs; `counts` are pairs and tiles done."""

            def one_pair(pair: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                head, row = lax.div(pair, batch), lax.rem(pair, batch)
                origin = head * sizes_g[0] + rows_g[0, row]
                first = jnp.maximum(start - origin, 0)
                stop = jnp.minimum(start + sizes_g[1] - origin, rows_g[0, row + 1] - rows_g[0, row])

                @pl.when(first < stop)
                def _() -> None:
                    work(pair, head, row, first, stop, *counts)

                pairs, tiles = counts
                return pairs + (first < stop).astype(jnp.int32), tiles + jnp.maximum(stop - first, 0)

            return lax.fori_loop(pairs_g[0, block], pairs_g[1, block], one_pair, counts)

        def copy_pair(pair, head, row, first, stop, pairs_done, tiles_done) -> None:
            kv_head = lax.div(head, passes)
            last_unit = lax.div(rows_g[1, row] - 1, unit)
            q_slot = lax.rem(pairs_done, 2)

            @pl.when(pairs_done >= 2)
            def _() -> None:
                plgpu.barrier_wait(q_free.at[q_slot])

            plgpu.copy_gmem_to_smem(q_g.at[row, head], q_s.at[q_slot], q_full.at[q_slot])

            @pl.loop(first, stop)
            def _(tile: jax.Array) -> None:
                done = tiles_done + tile - first
                slot = lax.rem(done, stages)
                pages = []  # before the waiting, so that it hides the reads of the page table
                for i in range(units):
                    # What is left of the last tile repeats the last page: entries beyond it may be anything.
                    index = jnp.minimum(rows_g[2, row] + tile * units + i, last_unit)
                    offset = pl.multiple_of(lax.rem(index, units_per_page) * unit, unit)
                    pages.append((table_g[row, lax.div(index, units_per_page)], offset, pl.ds(i * unit, unit)))
                every_column = pl.ds(pl.multiple_of(0 * done, 64), padded_dim)  # static bounds may not reach outside
                for source, target, columns, full, free in (
                    (k_g, k_s, pl.ds(0, head_dim), k_full, k_free),
                    (v_g, v_s, every_column, v_full, v_free),
                ):

                    @pl.when(done >= stages)
                    def _(free=free) -> None:
                        plgpu.barrier_wait(free.at[slot])

                    for page, offset, rows in pages:
                        copied = source.at[page, kv_head, pl.ds(offset, unit), columns]
                        plgpu.copy_gmem_to_smem(copied, target.at[slot, rows], full.at[slot])

        def attend_pair(pair, head, row, first, stop, pairs_done, tiles_done) -> None:
            length = rows_g[1, row]
            origin = rows_g[2, row] * unit
            q_slot = lax.rem(pairs_done, 2)
            plgpu.barrier_wait(q_full.at[q_slot])

            def one_tile(tile: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                largest, weight, total = state
                slot = lax.rem(tiles_done + tile - first, stages)
                position = origin + tile * TILE
                plgpu.barrier_wait(k_full.at[slot])
                scores = _product(k_s.at[slot], q_s.at[q_slot].T)
                plgpu.barrier_arrive(k_free.at[slot])
                scores = _capped(scores, scale, soft_cap)
                scores = jnp.where(_visible(position, head, length), scores, MASKED)
                new_largest = jnp.maximum(largest, scores.max(axis=0))
                shrink = jnp.exp2(largest - new_largest)
                new_weights = jnp.exp2(scores - for_each_row(new_largest, scores.shape))
                # Summed down the columns once, at the end: every such sum goes through all four warps.
                weight = weight * for_each_row(shrink, weight.shape) + new_weights
                in_storage_type = new_weights.astype(dtype)
                weights_s.T[...] = plgpu.layout_cast(in_storage_type, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.barrier_wait(v_full.at[slot])

                @pl.when(position + TILE > length)
                def _() -> None:
                    _clear_rows(v_s.at[slot], length - position)

                plgpu.commit_smem()
                new = _product(v_s.at[slot].T, weights_s.T)
                plgpu.barrier_arrive(v_free.at[slot])
                return new_largest, weight, total * for_each_row(shrink, total.shape) + new

            state = filled((width,), FLOOR), filled((TILE, width), 0), filled((padded_dim, width), 0)
            largest, weight, total = lax.fori_loop(first, stop, one_tile, state)
            plgpu.barrier_arrive(q_free.at[q_slot])
            weight = weight.sum(axis=0)
            divisor = jnp.maximum(weight, 1e-30)
            values_g[block + pair] = total / for_each_row(divisor, total.shape)
            logsums_g[block + pair] = jnp.where(weight > 0, largest + jnp.log2(divisor), MASKED)

        def _visible(position: jax.Array, head: jax.Array, length: jax.Array) -> jax.Array:
            keys = position + plgpu.broadcasted_iota(jnp.int32, (TILE, width), 0, layout=MATRIX)
            end = length
            if queries > 1:
                column = plgpu.broadcasted_iota(jnp.int32, (TILE, width), 1, layout=MATRIX)
                end = length - (queries - 1) + lax.div(column + lax.rem(head, passes) * width, group)
            return keys < end if window is None else (keys < end) & (keys >= end - window)

        none = (jnp.int32(0), jnp.int32(0))

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _() -> None:
            for_each_pair(attend_pair, none)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _() -> None:
            pairs, tiles = for_each_pair(copy_pair, none)

            # A block may not end before its barriers are at rest.
            @pl.loop(jnp.maximum(pairs - 2, 0), pairs)
            def _(done: jax.Array) -> None:
                plgpu.barrier_wait(q_free.at[lax.rem(done, 2)])

            @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
            def _(done: jax.Array) -> None:
                plgpu.barrier_wait(k_free.at[lax.rem(done, stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(done, stages)])

    places = blocks + heads * batch
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((places, padded_dim, width), jnp.float32),
            jax.ShapeDtypeStruct((places, width), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((2, width, head_dim), dtype, transforms=_swizzled(head_dim)),
            plgpu.SMEM((stages, TILE, head_dim), dtype, transforms=_swizzled(head_dim)),
            plgpu.SMEM((stages, TILE, padded_dim), dtype, transforms=_swizzled(value_dim)),
            plgpu.SMEM((width, TILE), dtype, transforms=_swizzled(value_dim)),  # both factors need one swizzle
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=units),
            plgpu.Barrier(num_barriers=stages, num_arrivals=units),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode_attention",
    )(q, k_pages, v_pages, page_table, *schedule)


def _product(a: Any, b: Any) -> jax.Array:
    """The float32 product of two matrices in shared memory."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _capped(scores: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Scaled and capped scores, base 2."""
    if soft_cap is None:
        return scores * (scale * LOG2_E)
    # tanh(x) = 1 - 2 / (1 + exp(2x)); the hardware's approximation of tanh itself has three digits only.
    cap = soft_cap * LOG2_E
    return cap - 2 * cap / (1 + jnp.exp2(scores * (2 * scale * LOG2_E / soft_cap)))


def _clear_rows(values: Any, count: jax.Array) -> None:
    """Zeros from row `count` on, a few columns at a time so that it takes few registers."""
    for begin in range(0, values.shape[1], 64):
        part = values.at[:, pl.ds(begin, 64)]
        loaded = plgpu.load(part, layout=MATRIX)
        kept = plgpu.broadcasted_iota(jnp.int32, loaded.shape, 0, layout=MATRIX) < count
        part[...] = jnp.where(kept, loaded, jnp.zeros_like(loaded))
