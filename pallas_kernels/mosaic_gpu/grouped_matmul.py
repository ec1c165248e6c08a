"""One matrix product per group of rows, for Hopper.

Operands are swapped: 64 output features are the rows of a WGMMA and the tokens its columns, so that a group of a few
tokens, as decoding has them, costs a column block of 8 and not a row block of 64. Weights and tokens both lie with the
input features last, which is what WGMMA wants of either operand.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.block_sizes import (
    GROUPED_MATMUL_CANDIDATES,
    GroupedMatmulBlocks,
    grouped_matmul_blocks,
)
from pallas_kernels.mosaic_gpu.shared_memory import swizzled

_STEP = 64  # input features of one step: 128 bytes, the widest swizzle
_FEATURES = 64  # of one warpgroup: the height of a WGMMA
_ROWS = 16  # of a partial tile in one copy, as long as there are so many
_SHARED_MEMORY = 227 * 1024  # bytes that a block may have on Hopper


def work_list(group_sizes: jax.Array, tokens: int, size: int) -> jax.Array:
    """Cut the rows of each group into tiles of at most `size`.

    `group_sizes` int32 `[groups]` of `tokens` rows in all, the last of which may be in no group. Returns int32
    `[3, tiles]`: each tile's group, first row and number of rows. The group of rows in none is `groups`; unused tiles
    have no rows.
    """
    groups = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, tokens - jnp.sum(group_sizes)).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    tiles = -(-sizes // size)
    tile_ends = jnp.cumsum(tiles)
    index = jnp.arange(tokens // size + groups + 1, dtype=jnp.int32)
    group = jnp.sum(tile_ends[:, None] <= index, axis=0, dtype=jnp.int32)
    inside = jnp.minimum(group, groups)
    start = (ends - sizes)[inside] + (index - (tile_ends - tiles)[inside]) * size
    count = jnp.clip(ends[inside] - start, 0, size)
    return jnp.stack([inside, start, jnp.where(group > groups, 0, count)])


def _kernel(groups: int, in_features: int, blocks: GroupedMatmulBlocks, dtype: Any) -> Callable[..., None]:
    warpgroups = blocks.out // _FEATURES
    steps = pl.cdiv(in_features, _STEP)

    def grouped_matmul(x_g, weights_g, tiles_g, out_g, *, x_s, weights_s, results_s, full, free) -> None:
        out_s, rows_s = results_s
        warpgroup = lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")
        feature = lax.axis_index("out") * blocks.out
        group, start, count = (tiles_g[field, tile] for field in range(3))
        in_group = group < groups

        def store(product: jax.Array) -> None:
            """Of float32 `[features, tokens]`, the tile's own tokens."""
            features = pl.ds(feature + warpgroup * _FEATURES, _FEATURES)

            def copy_rows(begin: jax.Array | int, end: jax.Array, rows: int) -> None:
                @pl.loop(begin, end)
                def _(index: jax.Array) -> None:
                    source = rows_s.at[warpgroup, pl.ds(index * rows, rows)]
                    plgpu.copy_smem_to_gmem(source, out_g.at[pl.ds(start + index * rows, rows), features])

            turned = plgpu.layout_cast(product.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)

            @pl.when(count == blocks.tokens)
            def _() -> None:
                out_s.at[warpgroup].T[...] = turned
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_g.at[pl.ds(start, blocks.tokens), features])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(count < blocks.tokens)
            def _() -> None:
                rows_s.at[warpgroup].T[...] = turned
                plgpu.commit_smem()

                copy_rows(0, lax.div(count, _ROWS), _ROWS)
                copy_rows(lax.div(count, _ROWS) * _ROWS, count, 1)
                plgpu.wait_smem_to_gmem(0)

        @pl.when((count > 0) & (warpgroup < warpgroups))
        def _() -> None:
            def multiply(product: Any) -> jax.Array:
                @pl.loop(0, jnp.where(in_group, steps, 0))
                def _(step: jax.Array) -> None:
                    slot = lax.rem(step, blocks.stages)
                    plgpu.barrier_wait(full.at[slot])
                    mine = weights_s.at[slot, pl.ds(warpgroup * _FEATURES, _FEATURES)]
                    plgpu.wgmma(product, mine, x_s.at[slot].T)
                    plgpu.wgmma_wait(1)  # the step before is done, this one may go on

                    @pl.when(step > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(free.at[lax.rem(step - 1, blocks.stages)])

                return product[...]

            product = pl.run_scoped(multiply, plgpu.ACC((_FEATURES, blocks.tokens), jnp.float32))

            @pl.when(in_group)
            def _() -> None:
                plgpu.barrier_arrive(free.at[(steps - 1) % blocks.stages])

            store(product)

        @pl.when((count > 0) & in_group & (warpgroup == warpgroups))
        def _() -> None:
            @pl.loop(0, steps)
            def _(step: jax.Array) -> None:
                slot = lax.rem(step, blocks.stages)

                @pl.when(step >= blocks.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                columns = pl.ds(pl.multiple_of(step * _STEP, _STEP), _STEP)
                plgpu.copy_gmem_to_smem(
                    weights_g.at[group, pl.ds(feature, blocks.out), columns], weights_s.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(x_g.at[pl.ds(start, blocks.tokens), columns], x_s.at[slot], full.at[slot])

            @pl.loop(max(steps - blocks.stages, 0), steps)
            def _(step: jax.Array) -> None:
                plgpu.barrier_wait(free.at[lax.rem(step, blocks.stages)])

    return grouped_matmul


def _scratch(blocks: GroupedMatmulBlocks, dtype: Any) -> dict[str, Any]:
    warpgroups = blocks.out // _FEATURES
    result = (warpgroups, blocks.tokens, _FEATURES)
    layout = swizzled(64)  # columns: a step's of input features, or a warpgroup's of output features
    return {
        "x_s": plgpu.SMEM((blocks.stages, blocks.tokens, _STEP), dtype, transforms=layout),
        "weights_s": plgpu.SMEM((blocks.stages, blocks.out, _STEP), dtype, transforms=layout),
        # A whole tile leaves in one swizzled copy; the rows of a partial one leave a few at a time.
        "results_s": plgpu.RefUnion(
            plgpu.SMEM(result, dtype, transforms=swizzled(_FEATURES)), plgpu.SMEM(result, dtype)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=blocks.stages),
    }


def shared_bytes(blocks: GroupedMatmulBlocks) -> int:
    """Shared memory of one block of the grid, barriers excluded."""
    return 2 * (blocks.stages * (blocks.tokens + blocks.out) * _STEP + blocks.tokens * blocks.out)


def refusal(x: jax.Array, weights: jax.Array) -> str | None:
    """What of the operands, or of their shapes and dtypes, the kernel does not take and what it does, or None."""
    if x.dtype != weights.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        given = f"tokens are {x.dtype} and weights {weights.dtype}"
        return f"{given}, and mosaic_gpu's grouped_matmul takes both in bfloat16 or both in float16"
    _, out_features, in_features = weights.shape
    if any(features % (8 if features < _STEP else _STEP) for features in (out_features, in_features)):
        given = f"weights are [{out_features}, {in_features}]"
        return f"{given}, and mosaic_gpu's grouped_matmul takes multiples of {_STEP} features, and below that of 8"
    return None


def grouped_matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, blocks: GroupedMatmulBlocks | None = None
) -> jax.Array:
    """`x` `[tokens, in]` times `weights` `[groups, out, in]` transposed, each row with its own group's weight.

    `x` is sorted by group: the first `group_sizes[0]` rows are of group 0, and so on; `group_sizes` int32 `[groups]`
    sums to at most `tokens`. Returns `[tokens, out]` in `x`'s dtype, accumulated in float32; zeros for rows that are
    in no group. For operands that `refusal` has nothing against; `blocks` from the table if they are left out.
    """
    tokens, in_features = x.shape
    groups, out_features, _ = weights.shape
    blocks = blocks or grouped_matmul_blocks(tokens, groups)
    padded = tokens if tokens < 8 else -(-tokens // 8) * 8  # TMA takes more than eight rows in eights
    x = jnp.pad(x, ((0, padded - tokens), (0, 0)))
    tiles = work_list(group_sizes, padded, blocks.tokens)
    return plgpu.kernel(
        _kernel(groups, in_features, blocks, x.dtype),
        out_type=jax.ShapeDtypeStruct((padded, out_features), x.dtype),
        # Blocks of one tile start together: they share its tokens, and blocks of a group's next tile its weights.
        grid=(pl.cdiv(out_features, blocks.out), tiles.shape[1]),
        grid_names=("out", "tile"),
        num_threads=blocks.out // _FEATURES + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(blocks, x.dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="grouped_matmul",
    )(x, weights, tiles)[:tokens]


def autotune(
    tokens: int,
    groups: int,
    out_features: int,
    in_features: int,
    dtype: Any = jnp.bfloat16,
    *,
    candidates: Sequence[GroupedMatmulBlocks] = GROUPED_MATMUL_CANDIDATES,
    repeats: int = 10,
) -> tuple[GroupedMatmulBlocks, dict[GroupedMatmulBlocks, float]]:
    """The quickest of `candidates` for `tokens` rows spread evenly over `groups`, and the seconds of each, on a GPU.

    Those that need more shared memory than there is are left out. One program multiplies with several weights, so many
    that none of any size is left in the L2 cache from the run before, as in a model; its quickest run counts.
    """
    copies = min(max(4, -(-(1 << 27) // (groups * out_features * in_features * 2))), 16)
    keys = jax.random.split(jax.random.key(0), copies + 1)
    x = jax.random.normal(keys[0], (tokens, in_features), dtype)
    weights = [jax.random.normal(key, (groups, out_features, in_features), dtype) for key in keys[1:]]
    sizes = jnp.full(groups, tokens // groups, jnp.int32).at[: tokens % groups].add(1)
    seconds = {}
    for blocks in candidates:
        if shared_bytes(blocks) > _SHARED_MEMORY - 1024:
            continue

        @jax.jit
        def run(
            x: jax.Array, weights: list[jax.Array], sizes: jax.Array, blocks: GroupedMatmulBlocks = blocks
        ) -> list[jax.Array]:
            return [grouped_matmul(x, weight, sizes, blocks=blocks) for weight in weights]

        jax.block_until_ready(run(x, weights, sizes))
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(run(x, weights, sizes))
            times.append(time.perf_counter() - started)
        seconds[blocks] = min(times) / copies
    return min(seconds, key=seconds.__getitem__), seconds
