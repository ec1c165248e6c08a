"""The product of a few rows with a weight in four bits, for Hopper; no GPU has timed it yet.

Operands are swapped: 64 outputs are the rows of a WGMMA and the tokens its columns. The weight passes from shared
memory through the registers, where its numbers become bf16 less their group's zero, straight into the matrix
instruction; a group's scale is for its sums. Blocks share the groups of a row between them where there are fewer
outputs than would keep the GPU's memory busy.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.shared_memory import swizzled

MAX_ROWS = 256  # above, products take longer than it takes to unpack the weight for XLA's
_STEP = 128  # input features: a group, or a part of one
_OUT = 64  # of a warpgroup: the height of a WGMMA
_TOKENS = 64  # of a block at most
_BLOCKS = 264  # that the grid should have at least: two for each multiprocessor
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def refusal(x: jax.Array, scale: jax.Array) -> str | None:
    """What of the operands the kernel does not take and what it does, or None."""
    if x.dtype != jnp.bfloat16:
        return f"rows are {x.dtype}, and mosaic_gpu's int4_matmul takes bfloat16"
    rows, in_features = x.shape
    if rows > MAX_ROWS:
        return f"there are {rows} rows, and mosaic_gpu's int4_matmul takes {MAX_ROWS} at most"
    if in_features // scale.shape[1] % _STEP:
        given = f"groups are of {in_features // scale.shape[1]}"
        return f"{given}, and mosaic_gpu's int4_matmul takes multiples of {_STEP}"
    if scale.shape[0] % _OUT:
        return f"there are {scale.shape[0]} outputs, and mosaic_gpu's int4_matmul takes multiples of {_OUT}"
    return None


def multiply(weight: jax.Array, x_transposed: Any) -> jax.Array:
    """`weight @ x_transposed`, of registers and shared memory: float32."""

    def run(product: Any) -> jax.Array:
        plgpu.wgmma(product, weight, x_transposed)
        return product[...]

    return pl.run_scoped(run, plgpu.ACC((weight.shape[0], x_transposed.shape[1]), jnp.float32))


class Blocks(NamedTuple):
    """What one block of the grid computes."""

    tokens: int
    warpgroups: int  # that multiply, `_OUT` outputs each
    stages: int  # steps in shared memory at once


def _blocks(rows: int, out_features: int) -> Blocks:
    """Few rows are next to nothing beside the weight; of many, two warpgroups read the same."""
    tokens = min(max(8, 1 << (rows - 1).bit_length()), _TOKENS)
    if tokens <= 16 or out_features % (2 * _OUT):
        return Blocks(tokens, 1, 8)
    return Blocks(tokens, 2, 4)


def _kernel(steps: int, steps_a_group: int, splits: int, blocks: Blocks) -> Callable[..., None]:
    each = pl.cdiv(steps, splits)
    tokens, warpgroups, stages = blocks

    def int4_matmul(x_g, weight_g, scale_g, zero_g, out_g, *, x_s, weight_s, out_s, full, free) -> None:
        split, warpgroup = lax.axis_index("split"), lax.axis_index("warpgroup")
        first = lax.axis_index("out") * warpgroups * _OUT
        rows = pl.ds(lax.axis_index("tokens") * tokens, tokens)
        begin = split * each
        count = jnp.minimum(steps - begin, each)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            outs = pl.ds(first + warpgroup * _OUT, _OUT)

            def group_of(step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
                """float32 scales and zeros `[outs]`."""
                group = lax.div(begin + step, steps_a_group)
                scale = plgpu.load(scale_g.at[outs, group], layout=_BY_ROW, optimized=False)
                zero = plgpu.load(zero_g.at[outs, group], layout=_BY_ROW, optimized=False)
                return scale, zero.astype(jnp.float32)

            def add_step(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                total, scale, zero = carry
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])
                mine = weight_s.at[slot, pl.ds(warpgroup * _OUT, _OUT)]
                numbers = plgpu.load(mine, layout=plgpu.Layout.WGMMA_UPCAST_4X)
                weight = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
                weight -= lax.broadcast_in_dim(zero.astype(jnp.bfloat16), weight.shape, [0])
                after = group_of(jnp.minimum(step + 1, count - 1))
                sums = multiply(weight, x_s.at[slot].T)
                plgpu.barrier_arrive(free.at[slot])
                return total + sums * lax.broadcast_in_dim(scale, sums.shape, [0]), *after

            nothing = plgpu.layout_cast(jnp.zeros((_OUT, tokens), jnp.float32), plgpu.Layout.WGMMA)
            total, *_ = lax.fori_loop(0, count, add_step, (nothing, *group_of(0)))
            out_s[warpgroup] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_g.at[split, outs, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            @pl.loop(0, count)
            def _(step: jax.Array) -> None:
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                columns = pl.ds(pl.multiple_of((begin + step) * _STEP, _STEP), _STEP)
                plgpu.copy_gmem_to_smem(
                    weight_g.at[pl.ds(first, warpgroups * _OUT), columns], weight_s.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(x_g.at[rows, columns], x_s.at[slot], full.at[slot])

            @pl.loop(jnp.maximum(count - stages, 0), count)
            def _(step: jax.Array) -> None:
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

    return int4_matmul


def int4_matmul(x: jax.Array, weight: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """`x` bf16 `[rows, in]` times a weight in four bits, transposed: float32 `[rows, out]`.

    The weight is as `pallas_kernels.matmul.matmul_nk_int4` has it; for operands that `refusal` has nothing against.
    """
    rows, in_features = x.shape
    out_features = len(weight)
    blocks = _blocks(rows, out_features)
    tokens, warpgroups, stages = blocks
    padded = -(-rows // tokens) * tokens
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    numbers = lax.bitcast_convert_type(weight, jnp.int4).reshape(out_features, in_features)
    grid = out_features // (_OUT * warpgroups), padded // tokens
    steps = in_features // _STEP
    splits = min(pl.cdiv(_BLOCKS, math.prod(grid)), max(1, steps // 4))
    splits = pl.cdiv(steps, pl.cdiv(steps, splits))  # none without work
    layout = plgpu.TilingTransform((8, _STEP)), plgpu.SwizzleTransform(_STEP // 2)  # type: ignore[abstract]
    partial = plgpu.kernel(
        _kernel(steps, steps // scale.shape[1], splits, blocks),
        out_type=jax.ShapeDtypeStruct((splits, out_features, padded), jnp.float32),
        grid=(*grid, splits),
        grid_names=("out", "tokens", "split"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "x_s": plgpu.SMEM((stages, tokens, _STEP), jnp.bfloat16, transforms=swizzled(_STEP)),
            "weight_s": plgpu.SMEM((stages, warpgroups * _OUT, _STEP), jnp.int4, transforms=layout),
            "out_s": plgpu.SMEM((warpgroups, _OUT, tokens), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="int4_matmul",
    )(x, numbers, scale, zero)
    return partial.sum(axis=0).T[:rows]
