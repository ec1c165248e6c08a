"""The second half of decode attention for Hopper: what several blocks found for one row becomes its output."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.decode_schedule import MULTIPROCESSORS, Schedule
from pallas_kernels.mosaic_gpu.softmax import BY_COLUMN, FLOOR, MASKED, MATRIX, filled, for_each_row

_REGISTERS = 64  # a thread's, that hold loads under way


def combine(
    values: jax.Array,
    logsums: jax.Array,
    schedule: Schedule,
    sinks: jax.Array | None,
    *,
    batch: int,
    columns: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """The softmax over all places of each pair of head and row, and over its sink.

    `values` float32 `[places, value_dim, width]` and `logsums` float32 `[places, width]`, base-2 logarithms of the
    weights' sum, as `Schedule` lays out places; `sinks` float32 `[heads, width]`, base 2 too. Returns
    `[batch, heads, columns, value_dim]`, the first `columns` of `width`; zeros where there is no place.

    A single long row has one place for every block of the device, and loading one after the other would take longer
    than its attention: several are loaded at once, and where pairs are few, four warpgroups share a pair.
    """
    _, value_dim, width = values.shape
    heads = (values.shape[0] - schedule.pairs.shape[1]) // batch
    warpgroups = 4 if heads * batch <= MULTIPROCESSORS else 1
    at_once = max(1, _REGISTERS * 128 // (value_dim * width))

    def body(*refs):
        values_g, logsums_g, rows_g, sizes_g, *sinks_g, out_g, values_s, state_s, out_s, ready = refs
        pair, warpgroup = lax.axis_index("pair"), lax.axis_index("warpgroup")
        head, row = lax.div(pair, batch), lax.rem(pair, batch)
        tiles = rows_g[0, row + 1] - rows_g[0, row]
        begin = head * sizes_g[0] + rows_g[0, row]
        first = lax.div(begin, sizes_g[1])
        count = jnp.where(tiles > 0, lax.div(begin + tiles - 1, sizes_g[1]) - first + 1, 0)

        def take_in(state, places):
            largest, weight, total = state
            new_largest = largest
            for logsum, _ in places:
                new_largest = jnp.maximum(new_largest, logsum)
            shrink = jnp.exp2(largest - new_largest)
            weight, total = weight * shrink, total * for_each_row(shrink, total.shape)
            for logsum, value in places:
                share = jnp.exp2(logsum - new_largest)
                weight, total = weight + share, total + value * for_each_row(share, total.shape)
            return new_largest, weight, total

        def some_places(step, state):
            places = []
            for i in range(at_once):
                index = (step * at_once + i) * warpgroups + warpgroup
                place = first + jnp.minimum(index, count - 1) + pair
                logsum = plgpu.load(logsums_g.at[place], layout=BY_COLUMN, optimized=False)
                value = plgpu.load(values_g.at[place], layout=MATRIX, optimized=False)
                places.append((logsum + jnp.where(index < count, 0.0, MASKED), value))
            return take_in(state, places)

        start = filled((width,), FLOOR), filled((width,), 0), filled((value_dim, width), 0)
        steps = pl.cdiv(count, at_once * warpgroups)
        largest, weight, total = lax.fori_loop(0, steps, some_places, start)
        values_s[warpgroup] = total
        state_s[warpgroup, 0] = largest
        state_s[warpgroup, 1] = weight
        plgpu.barrier_arrive(ready)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_wait(ready)
            top = filled((width,), FLOOR)
            for i in range(warpgroups):
                top = jnp.maximum(top, plgpu.load(state_s.at[i, 0], layout=BY_COLUMN))
            sum_of_weights, out = filled((width,), 0), filled((value_dim, width), 0)
            if sinks_g:
                sink = plgpu.load(sinks_g[0].at[head], layout=BY_COLUMN, optimized=False)
                top = jnp.maximum(top, sink)
                sum_of_weights += jnp.exp2(sink - top)
            for i in range(warpgroups):
                share = jnp.exp2(plgpu.load(state_s.at[i, 0], layout=BY_COLUMN) - top)
                sum_of_weights += plgpu.load(state_s.at[i, 1], layout=BY_COLUMN) * share
                part = plgpu.load(values_s.at[i], layout=MATRIX, optimized=False)
                out += part * for_each_row(share, part.shape)
            out /= for_each_row(jnp.maximum(sum_of_weights, 1e-30), out.shape)
            out_s.T[...] = plgpu.layout_cast(out.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, columns)], out_g.at[row, head])
            plgpu.wait_smem_to_gmem(0)

    operands = (values, logsums, schedule.rows, schedule.sizes, *(() if sinks is None else (sinks,)))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, columns, value_dim), dtype),
        grid=(heads * batch,),
        grid_names=("pair",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((warpgroups, value_dim, width), jnp.float32),
            plgpu.SMEM((warpgroups, 2, width), jnp.float32),
            plgpu.SMEM((width, value_dim), dtype),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode_combine",
    )(*operands)
