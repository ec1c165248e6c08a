"""Four-bit weights against ml_dtypes' own numbers of four bits and exponents of eight."""

import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoint.mxfp4 import unpacked

RANDOM = np.random.default_rng(0)
BLOCKS = RANDOM.integers(256, size=(5, 3, 16), dtype=np.uint8)
SCALES = RANDOM.integers(100, 150, size=(5, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    halves = np.stack([BLOCKS & 15, BLOCKS >> 4], axis=-1).reshape(5, 3, 32)
    numbers = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = SCALES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return (numbers * scales[..., None]).reshape(5, 96)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(None), slice(None)),
        (slice(1, 4), slice(32, 64)),
        (slice(2, 3), slice(24, 48)),  # across a boundary of blocks
        (slice(0, 5), slice(72, 96)),
        (slice(4, 5), slice(33, 35)),
    ],
)
def test_any_part_is_unpacked_as_it_is_in_the_whole(rows: slice, columns: slice, expected: np.ndarray) -> None:
    part = unpacked(BLOCKS, SCALES)[rows, columns]
    assert part.shape == expected[rows, columns].shape
    np.testing.assert_array_equal(np.asarray(part), expected[rows, columns])
    np.testing.assert_array_equal(np.asarray(part[1:]), expected[rows, columns][1:])
