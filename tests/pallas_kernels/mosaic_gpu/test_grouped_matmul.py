"""Hopper's grouped matrix product in the interpreter, against float64. A case takes seconds: they are few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels.mosaic_gpu.grouped_matmul as kernel
from pallas_kernels.mosaic_gpu.block_sizes import GROUPED_MATMUL_CANDIDATES, GroupedMatmulBlocks, grouped_matmul_blocks
from pallas_kernels.mosaic_gpu.grouped_matmul import grouped_matmul, work_list
from tests.pallas_kernels.mosaic_gpu.interpreter import interpreted
from tests.pallas_kernels.reference import TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "in_no_group", "features", "blocks", "dtype"),
    [
        pytest.param([3, 0, 20, 8], 5, (128, 96), GroupedMatmulBlocks(8, 64, 2), "bfloat16", id="few-rows-a-group"),
        # Neither features are a multiple of a block's: the hardware fills in zeros and leaves out what is beyond.
        pytest.param([0, 64 + 39], 0, (72, 136), GroupedMatmulBlocks(64, 128, 3), "float16", id="beyond-the-edge"),
    ],
)
def test_interpreted_groups_meet_their_own_weight_without_races(sizes, in_no_group, features, blocks, dtype, capsys):
    rng = np.random.default_rng(0)
    tokens = sum(sizes) + in_no_group
    x = jnp.asarray(rng.normal(size=(tokens, features[1])), dtype)
    weights = jnp.asarray(rng.normal(size=(len(sizes), *features)), dtype)
    with interpreted(capsys):
        out = np.asarray(grouped_matmul(x, weights, jnp.asarray(sizes, jnp.int32), blocks=blocks), np.float64)
    expected = np.zeros((tokens, features[0]))
    own = np.asarray(weights, np.float64)[np.repeat(np.arange(len(sizes)), sizes)]
    expected[: sum(sizes)] = np.einsum("ti,toi->to", np.asarray(x, np.float64)[: sum(sizes)], own)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 7, 8, 9, 80]), min_size=5, max_size=5),
    tile_size=st.sampled_from([8, 64]),
)
def test_work_list_has_every_row_once_and_with_its_own_group(sizes, tile_size):
    tokens = 400  # most often more than there are in groups
    found = [-1] * tokens
    for group, start, count in np.asarray(work_list(jnp.asarray(sizes, jnp.int32), tokens, tile_size)).T.tolist():
        assert count <= tile_size
        for row in range(start, start + count):
            assert found[row] == -1
            found[row] = group
    assert found == np.repeat(np.arange(len(sizes) + 1), [*sizes, tokens - sum(sizes)]).tolist()


@pytest.mark.parametrize("tokens", [1, 8, 64, 1_000, 100_000])
def test_blocks_of_the_table_are_among_the_candidates_that_are_timed(tokens):
    assert grouped_matmul_blocks(tokens, groups=8) in GROUPED_MATMUL_CANDIDATES


def test_autotuning_times_what_fits_and_returns_the_quickest(monkeypatch):
    def multiply(x, weights, group_sizes, blocks):
        return jax.lax.fori_loop(0, 1 if blocks.stages == 3 else 300, lambda _, x: jnp.sin(x @ weights[0].T), x)

    monkeypatch.setattr(kernel, "grouped_matmul", multiply)  # there is no GPU to time the kernel itself on
    too_large = GroupedMatmulBlocks(256, 128, 8)
    candidates = [GroupedMatmulBlocks(64, 64, 4), GroupedMatmulBlocks(64, 64, 3), too_large]
    best, seconds = kernel.autotune(16, 2, 64, 64, candidates=candidates)
    assert list(seconds) == candidates[:2]
    assert best == candidates[1]
    assert 0 < seconds[best] < seconds[candidates[0]]
