"""Pages whose values are the first numbers of their keys give what pages of both would."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.xla.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.tiles import prefill_tiles

RANDOM = np.random.default_rng(0)
K_PAGES = jnp.asarray(RANDOM.normal(size=(6, 1, 8, 20)), jnp.float32)
V_PAGES = K_PAGES[..., :12]
TABLE = jnp.asarray([[3, 0, 5], [1, 4, 2]], jnp.int32)


def test_decode():
    q, lengths = jnp.asarray(RANDOM.normal(size=(2, 1, 4, 20)), jnp.float32), jnp.asarray([17, 5], jnp.int32)
    found = paged_decode_attention(q, K_PAGES, None, TABLE, lengths, scale=0.3, value_dim=12)
    expected = paged_decode_attention(q, K_PAGES, V_PAGES, TABLE, lengths, scale=0.3)
    assert found.shape == (2, 1, 4, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_prefill():
    counts, positions = np.array([9, 6]), np.array([8, 0])
    tiles = jnp.asarray(prefill_tiles(np.array([0, 9]), counts, positions, 4, 6))
    q = jnp.asarray(RANDOM.normal(size=(16, 4, 20)), jnp.float32)
    found = paged_prefill_attention(q, K_PAGES, None, TABLE, tiles, tile_size=4, scale=0.3, value_dim=12)
    expected = paged_prefill_attention(q, K_PAGES, V_PAGES, TABLE, tiles, tile_size=4, scale=0.3)
    assert found.shape == (16, 4, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
