"""How the rows of a checkpoint's tensors lie in a fused parameter, in both directions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """One tensor of a checkpoint as a part of a parameter: `part` rows of every block.

    KV heads may be fewer in the checkpoint than in the parameter; each is then repeated in neighbouring blocks. Of a
    parameter with one source only, `rows` may end early: the vocabulary is padded.
    """

    name: str
    rows: np.ndarray  # [stored rows, ...]
    part: int


Sources = list[Source] | list[list[Source]]  # the latter for each entry of a stack


def rows_of_parts(rows: int, parts: tuple[int, ...]) -> list[int]:
    """How many rows each part has of a parameter of so many; one part alone is whole, however far that is padded."""
    blocks = rows // sum(parts) if len(parts) > 1 else 1
    return [blocks * part for part in parts]


def overlaps(
    sources: Sources, shape: tuple[int, ...], index: tuple[slice, ...], shard: np.ndarray
) -> Iterator[tuple[Source, np.ndarray, np.ndarray]]:
    """Views of equal shape, of `shard` and of a source, which hold the same numbers: all that `shard` is made of.

    `shard` is the part `index` of a parameter of `shape`. Copy one way to load it, the other way to take it apart.
    """
    start, stop, _ = index[0].indices(shape[0])
    rest = index[1:]
    if isinstance(sources[0], list):
        for own, own_shard in zip(sources[start:stop], shard, strict=True):
            yield from overlaps(own, shape[1:], rest, own_shard)
        return
    if len(sources) == 1:
        rows = sources[0].rows[(slice(start, stop), *rest)]
        yield sources[0], shard[: len(rows)], rows
        return
    block_rows = sum(source.part for source in sources)
    first, last, total = start // block_rows, stop // block_rows, shape[0] // block_rows
    blocks = shard.reshape(last - first, block_rows, *shard.shape[1:])
    offset = 0
    for source in sources:
        repeats = total * source.part // len(source.rows)
        stored = source.rows.reshape(-1, source.part, *source.rows.shape[1:])[(slice(None), slice(None), *rest)]
        target = blocks[:, offset : offset + source.part]
        if repeats == 1:
            yield source, target, stored[first:last]
        else:
            for block in range(first, last):
                yield source, target[block - first], stored[block // repeats]
        offset += source.part


def unfused(name: str, fused: np.ndarray, own_parts: tuple[int, ...], parts: tuple[int, ...]) -> list[Source]:
    """A parameter that was fused of blocks of `own_parts`, taken apart for one that is fused of blocks of `parts`."""
    if len(own_parts) == 1:
        return [Source(name, fused, parts[0])]
    blocks = fused.reshape(-1, sum(own_parts), *fused.shape[1:])
    pieces = np.split(blocks, np.cumsum(own_parts)[:-1], axis=1)
    return [Source(name, piece.reshape(-1, *fused.shape[1:]), part) for piece, part in zip(pieces, parts, strict=True)]
