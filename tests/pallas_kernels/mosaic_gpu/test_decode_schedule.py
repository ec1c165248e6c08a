"""The shares of decode attention's thread blocks."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.mosaic_gpu.decode_schedule import TILE, make_schedule


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 64, 65, 500, 4096]), min_size=5, max_size=5),
    heads=st.sampled_from([1, 3, 8]),
    blocks=st.sampled_from([1, 2, 7, 264]),
    window=st.sampled_from([None, 1, 100]),
    unit=st.sampled_from([16, 64]),
)
def test_every_tile_is_in_one_part_and_no_part_is_larger_than_its_share(lengths, heads, blocks, window, unit):
    schedule = make_schedule(
        jnp.asarray(lengths, jnp.int32), heads=heads, queries=1, window=window, unit=unit, blocks=blocks
    )
    (starts, kept_lengths, first_units), pairs, (total, part) = (np.asarray(array) for array in schedule)
    batch = len(lengths)
    assert kept_lengths[:batch].tolist() == lengths
    visible = [length if window is None else min(window, length) for length in lengths]
    assert all(
        0 <= length - first * unit - seen < unit
        for length, first, seen in zip(lengths, first_units, visible, strict=False)
    )
    done, places = [], []
    for block in range(blocks):
        tiles = 0
        for pair in range(*pairs[:, block]):  # as the kernel walks
            head, row = divmod(pair, batch)
            origin = head * total + starts[row]
            first = max(block * part - origin, 0)
            stop = min((block + 1) * part - origin, starts[row + 1] - starts[row])
            done += [(head, row, tile) for tile in range(first, stop)]
            places += [block + pair] if first < stop else []
            tiles += max(stop - first, 0)
        assert tiles <= -(-total * heads // blocks)
    row_tiles = [-(-(length - first * unit) // TILE) for length, first in zip(lengths, first_units, strict=False)]
    assert sorted(done) == [
        (head, row, tile) for head in range(heads) for row in range(batch) for tile in range(row_tiles[row])
    ]
    assert len(set(places)) == len(places)
    assert all(place < blocks + heads * batch for place in places)
