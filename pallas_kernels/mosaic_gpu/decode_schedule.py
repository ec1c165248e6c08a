"""How decode attention's work is shared out among thread blocks: in equal parts, however uneven the rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64  # tokens of one step: the rows of a warpgroup's matrix instruction
MULTIPROCESSORS = 132  # of an H100 SXM, H200 and GH200


class Schedule(NamedTuple):
    """All pairs of a head and a row, one after the other, cut into parts of as many tiles, one part for each block.

    Pair `head * batch + row` has the row's tiles. Walking along the pairs and the parts together, every step enters a
    new pair or a new part: what block `i` finds for pair `j` goes to place `i + j`, and nothing else does.
    """

    rows: jax.Array  # int32 [3, batch + 1]: tiles of the rows before; length; first visible unit of a page
    pairs: jax.Array  # int32 [2, blocks]: each block's first pair, and the one after its last
    sizes: jax.Array  # int32 [2]: tiles of all rows; tiles of a part


def make_schedule(
    lengths: jax.Array, *, heads: int, queries: int, window: int | None, unit: int, blocks: int
) -> Schedule:
    """The schedule of rows with `lengths` int32 `[batch]`, each under `heads` heads, for `blocks` thread blocks.

    A row's tiles begin with the first unit (a page, or `unit` tokens of a larger one) that one of its `queries` sees.
    It depends on nothing that differs between a model's layers, so XLA computes it once a step.
    """
    batch = len(lengths)
    first_units = jnp.zeros_like(lengths)
    if window is not None:
        first_units = jnp.maximum(lengths - queries + 1 - window, 0) // unit
    ends = jnp.cumsum(-(-(lengths - first_units * unit) // TILE))
    total = ends[-1]
    part = jnp.maximum(-(-total * heads // blocks), 1)
    edges = jnp.minimum(jnp.arange(blocks + 1) * part, total * heads)

    def pair_of(tile: jax.Array) -> jax.Array:
        head = tile // jnp.maximum(total, 1)
        return head * batch + jnp.sum(ends <= (tile - head * total)[:, None], axis=1)

    first, last = pair_of(edges[:-1]), pair_of(edges[1:] - 1)
    pairs = jnp.stack([first, jnp.where(edges[:-1] < edges[1:], last + 1, first)])
    rows = jnp.stack([jnp.pad(ends, (1, 0)), jnp.pad(lengths, (0, 1)), jnp.pad(first_units, (0, 1))])
    return Schedule(*(array.astype(jnp.int32) for array in (rows, pairs, jnp.stack([total, part]))))
