"""The block sizes of kernels that have a choice, by the shapes that they suit."""

from typing import NamedTuple


class GroupedMatmulBlocks(NamedTuple):
    """What one block of the grid of `grouped_matmul` computes."""

    tokens: int  # a multiple of 8 up to 256
    out: int  # output features: 64 for each compute warpgroup, of one or two
    stages: int  # steps of 64 input features in shared memory at once


# Rows that a group has on average, up to which the blocks serve; the last serve all above. Computed from what follows,
# not yet measured: few rows are bound by reading weights, so two blocks share a multiprocessor and keep 72 KiB of
# copies under way each; many rows are bound by the tensor cores, where a warpgroup of 64 × 256 reads the least shared
# memory for each product. `autotune` of `grouped_matmul` measures candidates on a GPU.
_GROUPED_MATMUL = (
    (8, GroupedMatmulBlocks(tokens=8, out=128, stages=5)),
    (16, GroupedMatmulBlocks(tokens=16, out=128, stages=5)),
    (32, GroupedMatmulBlocks(tokens=32, out=128, stages=5)),
    (64, GroupedMatmulBlocks(tokens=64, out=128, stages=3)),
    (256, GroupedMatmulBlocks(tokens=128, out=128, stages=5)),
    (None, GroupedMatmulBlocks(tokens=256, out=128, stages=3)),
)

GROUPED_MATMUL_CANDIDATES = tuple(
    GroupedMatmulBlocks(tokens, out, stages)
    for tokens in (8, 16, 32, 64, 128, 256)
    for out in (64, 128)
    for stages in (3, 4, 5, 6, 8)
)


def grouped_matmul_blocks(tokens: int, groups: int) -> GroupedMatmulBlocks:
    """The blocks for so many rows spread over so many groups."""
    rows = -(-tokens // groups)
    return next(blocks for limit, blocks in _GROUPED_MATMUL if limit is None or rows <= limit)
