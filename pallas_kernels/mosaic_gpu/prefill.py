"""Ragged paged prefill attention for Hopper, compiled for the H200 and checked in the interpreter; no GPU has timed it.

**What bounds it.** Causal attention of 8,192 tokens with 32 heads of 128 is 4 x 128 x 32 flops for each of 33.6 million
pairs, 0.55 TFLOP, on 134 MB of queries and outputs and 34 MB of keys and values: 3,300 flops a byte, where the H200 has
206. Only the tensor cores count: 0.56 ms at their 989 TFLOP/s of bf16, 0.92 ms at 600.

**How it goes.** FlashAttention-3's schedule (Shah et al., 2024, arXiv:2407.08608) over pages. A block of the grid is
one tile of queries and 128 rows of work: two compute warpgroups of 64 rows each share every key and value that a third
warpgroup brings in, one TMA copy a page (or half a page of 128 at head size 256). With tiles of 128 tokens the
warpgroups split the tokens of one head; with tiles of 64 they take two query heads of the same KV head.

A step of 128 keys at head size 128 costs each warpgroup 2 x 64 x 128 x 128 multiply-adds, 1,024 cycles of the tensor
cores of a multiprocessor, and 8,192 exponentials, 512 cycles of its special function units, with some 350 further
instructions a thread, 350 cycles. One after the other, that would leave the tensor cores idle for almost half of the
time. So each warpgroup starts the scores of its next step together with the values of this one and computes the softmax
while the latter are under way, and the warpgroups take turns at starting products, so that the softmax of one falls
into the products of the other: 2,048 cycles of products to hide 1,024 of exponentials and 700 of the rest.

**Memory.** Shared, at head size 128: 32 KiB of queries, two stages of keys and of values at 32 KiB each, 32 KiB for the
rows of partial tiles. Matrix instructions read 96 of its 128 bytes a cycle for the scores (queries and keys) and 64 for
the values, whose weights come from registers. Registers a thread, of 232: 64 accumulated, 64 of scores, 32 of weights.

**What is stale.** Positions from a tile's end on may hold another sequence's leftovers, even NaN, which a weight of
zero does not silence; the last step's values are overwritten with zeros there before they are used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.shared_memory import swizzled
from pallas_kernels.mosaic_gpu.softmax import LOG2_E, MASKED, MATRIX

_ROWS = 64  # of one warpgroup: the height of a WGMMA
_COMPUTE, _MEMORY = 2, 2  # compute warpgroups; the index of the one that moves memory
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)


def rows_of(values: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(values, like.shape, [0])


def multiply_both(
    q: Any,
    k_transposed: Any,
    weights: jax.Array,
    v: Any,
    accumulated: jax.Array,
    started: Callable[[], None],
    softmax: Callable[[jax.Array], tuple[jax.Array, ...]],
    carry: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """`accumulated + weights @ v`, and `softmax(q @ k_transposed)`, which runs while the former is under way.

    `started` is called once both products are queued. `softmax` returns arrays of the shapes and dtypes of `carry`.
    """

    def run(refs: Any) -> None:
        out, *new_carry = refs

        def scored(scores: Any) -> tuple[jax.Array, ...]:
            plgpu.wgmma(scores, q, k_transposed)
            plgpu.wgmma(out, weights, v)
            started()
            return softmax(plgpu.wgmma_accumulator_load(scores, wait_n=1))

        shape = (q.shape[0], k_transposed.shape[1])
        for ref, value in zip(new_carry, pl.run_scoped(scored, plgpu.ACC(shape, jnp.float32)), strict=True):
            ref[...] = value

    return pl.run_state(run)((plgpu.ACC.init(accumulated), *carry))


def multiply(q: Any, k_transposed: Any) -> jax.Array:
    """`q @ k_transposed` of shared memory."""

    def run(out: Any) -> jax.Array:
        plgpu.wgmma(out, q, k_transposed)
        return out[...]

    return pl.run_scoped(run, plgpu.ACC((q.shape[0], k_transposed.shape[1]), jnp.float32))


def accumulate(weights: jax.Array, v: Any, accumulated: jax.Array) -> jax.Array:
    """`accumulated + weights @ v`."""
    return pl.run_state(lambda out: plgpu.wgmma(out, weights, v))(plgpu.ACC.init(accumulated))


@dataclass(frozen=True)
class _Plan:
    """What one kernel is compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    tile_size: int
    dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None
    stages: int = 2  # steps whose keys, or values, are in shared memory at once

    @property
    def block(self) -> int:
        """Keys of one step."""
        return 128 if self.head_dim <= 128 else 64

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def heads_at_once(self) -> int:
        return _COMPUTE * _ROWS // self.tile_size

    @property
    def heads_of_grid(self) -> int:
        """Blocks of the grid that share a tile."""
        return self.kv_heads * pl.cdiv(self.group, self.heads_at_once)

    @property
    def copy_rows(self) -> int:
        """Tokens that one copy brings: a page, or as much of one as a step takes."""
        return min(self.page_size, self.block)

    @property
    def copies(self) -> int:
        return self.block // self.copy_rows

    @property
    def staged_dim(self) -> int:
        """Columns of a tile's last rows that are staged at once: a row starts at a multiple of 128 bytes, for TMA."""
        return min(pl.cdiv(self.head_dim, 64) * 64, 128)

    def scratch(self) -> dict[str, Any]:
        layout = swizzled(self.head_dim)
        keys_or_values = plgpu.SMEM((self.stages, self.block, self.head_dim), self.dtype, transforms=layout)
        return {
            "q_s": plgpu.SMEM((_COMPUTE, _ROWS, self.head_dim), self.dtype, transforms=layout),
            "k_s": keys_or_values,
            "v_s": keys_or_values,
            "rows_s": plgpu.SMEM((_COMPUTE, _ROWS, self.staged_dim), self.dtype),
            "q_full": plgpu.Barrier(num_barriers=_COMPUTE),
            "k_full": plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.stages),
            "v_full": plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.stages),
            "k_free": plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=self.stages),
            "v_free": plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=self.stages),
            "tail_full": plgpu.Barrier(num_arrivals=self.copies),
            "turn": plgpu.Barrier(num_barriers=_COMPUTE),
        }


class _Tile(NamedTuple):
    """One tile as a block of the grid sees it: scalars, positions and pages of its sequence."""

    sequence: jax.Array
    start: jax.Array  # of its tokens on the flat axis
    tokens: jax.Array
    position: jax.Array  # of its first token
    end: jax.Array  # the position after its last token
    first_page: jax.Array  # that any of its tokens sees
    first_step: jax.Array
    steps: jax.Array

    @classmethod
    def read(cls, tiles: Any, index: jax.Array, plan: _Plan) -> "_Tile":
        sequence, start, tokens, position = (tiles[field, index] for field in range(4))
        end = position + tokens
        oldest = jnp.int32(0) if plan.window is None else jnp.maximum(position - plan.window + 1, 0)
        first_step = lax.div(oldest, jnp.int32(plan.block))
        steps = pl.cdiv(end, jnp.int32(plan.block)) - first_step
        first_page = lax.div(oldest, jnp.int32(plan.page_size))
        return cls(sequence, start, tokens, position, end, first_page, first_step, steps)


def _move(plan: _Plan, tile: _Tile, kv_head: jax.Array, k_g, v_g, table_g, k_s, v_s, barriers) -> None:
    """The memory warpgroup: keys and values of every step, page by page."""
    last_page = lax.div(tile.end - 1, jnp.int32(plan.page_size))

    def copy(step: jax.Array, pages: Any, shared: Any, full: Any) -> None:
        for index in range(plan.copies):
            key = (tile.first_step + step) * plan.block + index * plan.copy_rows
            # What lies outside the pages that the tile sees is masked but must not be NaN: any page of its own will do.
            page = jnp.clip(lax.div(key, jnp.int32(plan.page_size)), tile.first_page, last_page)
            offset = pl.multiple_of(lax.rem(key, jnp.int32(plan.page_size)), plan.copy_rows)
            plgpu.copy_gmem_to_smem(
                pages.at[table_g[tile.sequence, page], kv_head, pl.ds(offset, plan.copy_rows)],
                shared.at[lax.rem(step, plan.stages), pl.ds(index * plan.copy_rows, plan.copy_rows)],
                full,
            )

    def wait_until_free(step: jax.Array, free: Any) -> None:
        @pl.when(step >= plan.stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, plan.stages)])

    def copy_keys(step: jax.Array) -> None:
        wait_until_free(step, barriers["k_free"])
        copy(step, k_g, k_s, barriers["k_full"].at[lax.rem(step, plan.stages)])

    def copy_values(step: jax.Array) -> None:
        copy(step, v_g, v_s, barriers["v_full"].at[lax.rem(step, plan.stages)])

    def copy_values_and_clear_tail(step: jax.Array) -> None:
        """Positions past the tile's end may hold NaN, which a weight of zero would let through."""
        slot = lax.rem(step, plan.stages)
        copy(step, v_g, v_s, barriers["tail_full"])
        plgpu.barrier_wait(barriers["tail_full"])
        first_key = (tile.first_step + step) * plan.block
        width = swizzled(plan.head_dim)[0].tiling[1]  # columns at once: few, for few registers
        for row in range(0, plan.block, _ROWS):
            for column in range(0, plan.head_dim, width):
                part = v_s.at[slot, pl.ds(row, _ROWS), pl.ds(column, width)]
                keys = first_key + row + plgpu.broadcasted_iota(jnp.int32, (_ROWS, width), 0, layout=MATRIX)
                seen = (keys >= tile.first_page * plan.page_size) & (keys < tile.end)
                part[...] = jnp.where(seen, plgpu.load(part, layout=MATRIX), 0)
        plgpu.commit_smem()
        for _ in range(plan.copies):
            plgpu.barrier_arrive(barriers["v_full"].at[slot])

    copy_keys(jnp.int32(0))

    @pl.loop(0, tile.steps - 1)
    def _(step: jax.Array) -> None:
        copy_keys(step + 1)
        wait_until_free(step, barriers["v_free"])
        copy_values(step)

    last = tile.steps - 1
    wait_until_free(last, barriers["v_free"])
    lax.cond(lax.rem(tile.end, jnp.int32(plan.block)) == 0, copy_values, copy_values_and_clear_tail, last)

    @pl.loop(jnp.maximum(tile.steps - plan.stages, 0), tile.steps)
    def _(step: jax.Array) -> None:
        plgpu.barrier_wait(barriers["k_free"].at[lax.rem(step, plan.stages)])
        plgpu.barrier_wait(barriers["v_free"].at[lax.rem(step, plan.stages)])


def _attend(plan: _Plan, tile: _Tile, position: jax.Array, sink: jax.Array | None, q, k_s, v_s, barriers) -> jax.Array:
    """A compute warpgroup: attention of its rows, the first at `position`. Float32 `[rows, head_dim]`."""
    warpgroup = lax.axis_index("warpgroup")
    shape = (_ROWS, plan.block)
    # Scores are kept in units that make their exponential exp2(factor * score - largest): one multiply-add each.
    factor = LOG2_E * (plan.scale if plan.soft_cap is None else plan.soft_cap)

    def weigh(
        step: jax.Array, scores: jax.Array, largest: jax.Array, total: jax.Array, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if plan.soft_cap is not None:
            # tanh by way of exp2: the device's own approximate tanh is off by a thousandth, and the cap multiplies it
            scores = 1 - 2 / (1 + jnp.exp2(scores * (2 * LOG2_E * plan.scale / plan.soft_cap)))
        if masked:
            # Behind a barrier, or the compiler would keep every column's position in a register all through the loops.
            first_key = lax.optimization_barrier((tile.first_step + step) * plan.block)
            keys = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
            positions = position + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            visible = keys <= positions
            if plan.window is not None:
                visible &= keys > positions - plan.window
            scores = jnp.where(visible, scores, MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=1) * factor)
        weights = jnp.exp2(scores * factor - rows_of(new_largest, scores))
        total = total * jnp.exp2(largest - new_largest) + weights.sum(axis=1)
        return weights, new_largest, total

    def packed(weights: jax.Array) -> jax.Array:
        # Behind a barrier: the compiler must not write them into registers that a product under way still reads, or it
        # would give up on running anything beside that product.
        return lax.optimization_barrier(weights).astype(plan.dtype)

    def one_step(step: jax.Array, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        accumulated, weights, largest, total = carry
        slot, before = lax.rem(step, plan.stages), lax.rem(step - 1, plan.stages)

        def softmax(scores: jax.Array) -> tuple[jax.Array, ...]:
            plgpu.barrier_arrive(barriers["k_free"].at[slot])
            weighed = lax.optimization_barrier(weigh(step, scores, largest, total, masked))
            # This wait, for the next product's values, also keeps the softmax where it is: without a branch here ptxas
            # would wait for the product under way first and leave nothing to run beside it.
            plgpu.barrier_wait(barriers["v_full"].at[slot])
            return weighed

        plgpu.barrier_wait(barriers["k_full"].at[slot])
        plgpu.barrier_wait(barriers["turn"].at[warpgroup])
        accumulated, weights, new_largest, total = multiply_both(
            q,
            k_s.at[slot].T,
            weights,
            v_s.at[before],
            accumulated,
            lambda: plgpu.barrier_arrive(barriers["turn"].at[1 - warpgroup]),
            softmax,
            (jnp.zeros(shape, jnp.float32), largest, total),
        )
        plgpu.barrier_arrive(barriers["v_free"].at[before])
        accumulated = accumulated * rows_of(jnp.exp2(largest - new_largest), accumulated)
        return accumulated, packed(weights), new_largest, total

    # Steps whose keys are all in every row's window, and all before every row: no mask.
    oldest = jnp.int32(0) if plan.window is None else jnp.maximum(position + _ROWS - plan.window, 0)
    unmasked_from = jnp.clip(pl.cdiv(oldest, jnp.int32(plan.block)) - tile.first_step, 1, tile.steps)
    unmasked_to = lax.div(position + 1, jnp.int32(plan.block)) - tile.first_step
    unmasked_to = jnp.clip(unmasked_to, unmasked_from, tile.steps)

    start = jnp.full((_ROWS,), MASKED if sink is None else sink * LOG2_E, jnp.float32)
    largest = plgpu.layout_cast(start, _PER_ROW)
    total = plgpu.layout_cast(jnp.full((_ROWS,), 0 if sink is None else 1, jnp.float32), _PER_ROW)
    accumulated = plgpu.layout_cast(jnp.zeros((_ROWS, plan.head_dim), jnp.float32), MATRIX)

    @pl.when(warpgroup == 1)
    def _() -> None:
        plgpu.barrier_arrive(barriers["turn"].at[0])

    plgpu.barrier_wait(barriers["k_full"].at[0])
    scores = multiply(q, k_s.at[0].T)
    plgpu.barrier_arrive(barriers["k_free"].at[0])
    weights, largest, total = weigh(jnp.int32(0), scores, largest, total, masked=True)
    plgpu.barrier_wait(barriers["v_full"].at[0])
    carry = (accumulated, packed(weights), largest, total)
    if plan.window is not None:
        carry = lax.fori_loop(1, unmasked_from, lambda step, carry: one_step(step, carry, masked=True), carry)
    carry = lax.fori_loop(unmasked_from, unmasked_to, lambda step, carry: one_step(step, carry, masked=False), carry)
    carry = lax.fori_loop(unmasked_to, tile.steps, lambda step, carry: one_step(step, carry, masked=True), carry)
    accumulated, weights, _, total = carry
    slot = lax.rem(tile.steps - 1, plan.stages)
    accumulated = accumulate(weights, v_s.at[slot], accumulated)
    plgpu.barrier_arrive(barriers["v_free"].at[slot])

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.barrier_wait(barriers["turn"].at[0])

    return accumulated * rows_of(1 / total, accumulated)


def _store(plan: _Plan, out: jax.Array, start: jax.Array, head: jax.Array, count: jax.Array, out_g, tile_s, rows_s):
    """The first `count` rows, no other: what follows them is another tile's."""

    @pl.when(count >= _ROWS)
    def _() -> None:
        tile_s[...] = out.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile_s, out_g.at[pl.ds(start, _ROWS), head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when((count > 0) & (count < _ROWS))
    def _() -> None:
        for column in range(0, plan.head_dim, plan.staged_dim):
            columns = min(plan.staged_dim, plan.head_dim - column)
            rows_s[:, pl.ds(0, columns)] = out[:, column : column + columns].astype(plan.dtype)
            plgpu.commit_smem()

            @pl.loop(0, count)
            def _(row: jax.Array, column: int = column, columns: int = columns) -> None:
                plgpu.copy_smem_to_gmem(
                    rows_s.at[row, pl.ds(0, columns)], out_g.at[start + row, head, pl.ds(column, columns)]
                )

            plgpu.wait_smem_to_gmem(0)


def _kernel(plan: _Plan, tiles: int, with_sinks: bool) -> Callable[..., None]:
    def prefill(q_g, k_g, v_g, table_g, tiles_g, *rest, q_s, k_s, v_s, rows_s, **barriers) -> None:
        *sinks_g, out_g = rest
        warpgroup = lax.axis_index("warpgroup")
        # The last tiles of a long chunk see the most keys: they start first, so that the shortest end the grid.
        index = tiles - 1 - lax.axis_index("tile")
        blocks = jnp.int32(pl.cdiv(plan.group, plan.heads_at_once))
        kv_head = lax.div(lax.axis_index("head"), blocks)
        used = tiles_g[2, index] > 0

        @pl.when(used & (warpgroup < _COMPUTE))
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            tile = _Tile.read(tiles_g, index, plan)
            in_group = lax.rem(lax.axis_index("head"), blocks) * plan.heads_at_once
            shared = plan.heads_at_once == 1  # both warpgroups work on one head
            before = warpgroup * _ROWS if shared else jnp.int32(0)
            of_group = in_group if shared else in_group + warpgroup
            head = kv_head * plan.group + jnp.minimum(of_group, plan.group - 1)
            tile_s = q_s.at[warpgroup]
            plgpu.copy_gmem_to_smem(
                q_g.at[pl.ds(tile.start + before, _ROWS), head], tile_s, barriers["q_full"].at[warpgroup]
            )
            plgpu.barrier_wait(barriers["q_full"].at[warpgroup])
            sink = sinks_g[0][head] if with_sinks else None
            out = _attend(plan, tile, tile.position + before, sink, tile_s, k_s, v_s, barriers)
            # Read again: nothing of it has to stay in a register through the loop over the keys.
            tile = _Tile.read(tiles_g, index, plan)
            count = jnp.where(of_group < plan.group, tile.tokens - before, 0)
            _store(plan, out, tile.start + before, head, count, out_g, tile_s, rows_s.at[warpgroup])

        @pl.when(used & (warpgroup == _MEMORY))
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _move(plan, _Tile.read(tiles_g, index, plan), kv_head, k_g, v_g, table_g, k_s, v_s, barriers)

    return prefill


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    tiles: jax.Array,
    *,
    tile_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`pallas_kernels.xla.paged_attention.paged_prefill_attention` for what `refuse_prefill` has nothing against.

    Tiles of 64 tokens suit an even number of query heads for each KV head, tiles of 128 any.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    # A copy may reach beyond the last token, but not be larger than the whole, which it takes in eights.
    q = jnp.pad(q, ((0, max(_ROWS, -(-tokens // 8) * 8) - tokens), (0, 0), (0, 0)))
    plan = _Plan(heads, kv_heads, head_dim, page_size, tile_size, q.dtype, scale, window, soft_cap)
    kernel = plgpu.kernel(
        _kernel(plan, tiles.shape[1], sinks is not None),
        grid=(plan.heads_of_grid, tiles.shape[1]),
        grid_names=("head", "tile"),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=plan.scratch(),
        # Layouts are said, not inferred: inference has no answer for this kernel.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="paged_prefill_attention",
    )
    out = jax.new_ref(jnp.zeros_like(q))  # tokens in no tile stay zero
    kernel(q, k_pages, v_pages, page_table, tiles, *([] if sinks is None else [sinks]), out)
    return jax.freeze(out)[:tokens]
