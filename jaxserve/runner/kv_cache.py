"""The page pool's arrays, and the attention that a model runs over them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import TENSOR, sharding
from pallas_kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.write_pages import write_pages

_HEADS = PartitionSpec(None, TENSOR)  # of queries, keys, values and pages alike: the axis after the first


class KVCache(NamedTuple):
    """A K and a V array per layer, `[pages, kv_heads, page_size, head_dim]`, split over the mesh by heads.

    One array a layer, never stacked: XLA updates each in place.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, config: ModelConfig, *, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh) -> "KVCache":
        """Zeroed pages for `config` as it stands on the mesh (`over_tensor_axis`)."""
        shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
        where = sharding(mesh, *_HEADS)
        return cls(
            tuple(jnp.zeros(shape, dtype, device=where) for _ in range(config.num_layers)),
            tuple(jnp.zeros(shape, dtype, device=where) for _ in range(config.num_layers)),
        )


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page in all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


class DecodeRows(NamedTuple):
    """One query a row."""

    page_table: jax.Array  # int32 [rows, max_pages]
    lengths: jax.Array  # int32 [rows], the query's own position included


class PrefillRows(NamedTuple):
    """Chunks of several sequences on one flat axis."""

    page_table: jax.Array  # int32 [rows, max_pages]
    tiles: jax.Array  # int32 [4, tiles]


class PagedAttend:
    """The `Attend` of one step: writes each layer's new keys and values to their pages, then attends to all pages.

    `cache` holds the arrays after the layers that have run. Each device works on its own heads. `implementation` is
    the attention kernels'.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: DecodeRows | PrefillRows,
        page_ids: jax.Array,
        offsets: jax.Array,
        *,
        mesh: Mesh,
        implementation: str,
        tile_size: int = 0,
    ):
        self._k, self._v = list(cache.k), list(cache.v)
        self._rows, self._page_ids, self._offsets = rows, page_ids, offsets
        self._mesh, self._implementation, self._tile_size = mesh, implementation, tile_size

    @property
    def cache(self) -> KVCache:
        return KVCache(tuple(self._k), tuple(self._v))

    def __call__(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        whole = PartitionSpec()
        run = jax.shard_map(
            partial(self._on_one_device, scale=scale, window=window, soft_cap=soft_cap),
            mesh=self._mesh,
            in_specs=((_HEADS,) * 5, PartitionSpec(TENSOR), whole),
            out_specs=(_HEADS, _HEADS, _HEADS),
            check_vma=False,
        )
        heads = (q, k, v, self._k[layer], self._v[layer])
        out, self._k[layer], self._v[layer] = run(heads, sinks, (self._rows, self._page_ids, self._offsets))
        return out

    def _on_one_device(self, heads, sinks, places, **variant):
        q, k, v, k_pages, v_pages = heads
        rows, page_ids, offsets = places
        variant |= {"sinks": sinks, "implementation": self._implementation}
        k_pages = write_pages(k_pages, k, page_ids, offsets)
        v_pages = write_pages(v_pages, v, page_ids, offsets)
        if isinstance(rows, DecodeRows):
            out = paged_decode_attention(q[:, None], k_pages, v_pages, rows.page_table, rows.lengths, **variant)[:, 0]
        else:
            out = paged_prefill_attention(
                q, k_pages, v_pages, rows.page_table, rows.tiles, tile_size=self._tile_size, **variant
            )
        return out, k_pages, v_pages
