"""The work list of prefill attention. Plain numpy: it is made on the host."""

import numpy as np


def prefill_tiles(
    starts: np.ndarray, counts: np.ndarray, positions: np.ndarray, size: int, capacity: int
) -> np.ndarray:
    """Cut the ragged rows of a flat token axis into query tiles of at most `size` tokens of one row each.

    Row `r` has `counts[r]` tokens from flat index `starts[r]` on, the first at `positions[r]` of its sequence. Returns
    int32 `[4, capacity]`: each tile's row, first flat index, number of tokens and first position; unused tiles have
    no tokens.
    """
    tiles = np.zeros((4, capacity), np.int32)
    per_row = -(-counts // size)
    rows = np.repeat(np.arange(len(counts)), per_row)
    within = (np.arange(len(rows)) - np.repeat(np.cumsum(per_row) - per_row, per_row)) * size
    tiles[:, : len(rows)] = (
        rows,
        starts[rows] + within,
        np.minimum(size, counts[rows] - within),
        positions[rows] + within,
    )
    return tiles
