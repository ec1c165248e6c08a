"""The page pool's arrays, and the attention that a model runs over them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import TENSOR, sharding
from jaxserve.runner.cache_layout import CacheLayout
from pallas_kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from pallas_kernels.xla.write_pages import write_pages

_HEADS = PartitionSpec(None, TENSOR)  # of queries, keys, values and pages alike: the axis after the first


class KVCache(NamedTuple):
    """K and V arrays `[pages, kv_heads, page_size, head_dim]`, split over the mesh by heads; which of them is whose
    layer's, `CacheLayout` says.

    One array a layer, never stacked: XLA updates each in place. No V array where values are the first numbers of keys.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array | None, ...]

    @classmethod
    def empty(cls, config: ModelConfig, layout: CacheLayout, *, num_pages: int, dtype: jnp.dtype) -> "KVCache":
        """Zeroed pages for `config` as it stands on a mesh (`over_tensor_axis`)."""

        def pages(dim: int) -> jax.Array:
            shape = (num_pages, config.num_kv_heads, layout.page_size, dim)
            return jnp.zeros(shape, dtype)

        arrays = range(layout.num_arrays)
        return cls(
            tuple(pages(config.key_dim) for _ in arrays),
            tuple(pages(config.value_dim) if config.value_dim else None for _ in arrays),
        )

    @staticmethod
    def sharding(mesh: Mesh) -> NamedSharding:
        """How each array is split."""
        return sharding(mesh, *_HEADS)


def page_bytes(config: ModelConfig, layout: CacheLayout, dtype: jnp.dtype) -> int:
    """Bytes of one page in all layers of a group, keys and values."""
    numbers = config.num_kv_heads * (config.key_dim + config.value_dim)
    return layout.num_arrays * numbers * layout.page_size * jnp.dtype(dtype).itemsize


class DecodeRows(NamedTuple):
    """One query a row."""

    lengths: jax.Array  # int32 [rows], the query's own position included


class PrefillRows(NamedTuple):
    """Chunks of several sequences on one flat axis."""

    tiles: jax.Array  # int32 [4, tiles]


class Places(NamedTuple):
    """Where sequences' pages are, and where in them a step writes: by group of layers."""

    page_tables: jax.Array  # int32 [groups, rows, max_pages]
    page_ids: jax.Array  # int32 [groups, tokens]; outside the pool: nothing is written
    offsets: jax.Array  # int32 [tokens]


class PagedAttend:
    """The `Attend` of one step: writes each layer's new keys and values to their pages, then attends to all pages.

    `cache` holds the arrays after the layers that have run. Each device works on its own heads. `implementation` is
    the attention kernels'.
    """

    def __init__(
        self,
        cache: KVCache,
        layout: CacheLayout,
        rows: DecodeRows | PrefillRows,
        places: Places,
        *,
        mesh: Mesh,
        implementation: str,
        tile_size: int = 0,
    ):
        self._k, self._v = list(cache.k), list(cache.v)
        self._layout, self._rows, self._places = layout, rows, places
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
        group, array = self._layout.places[layer]
        heads = (q, k, v, self._k[array], self._v[array])
        places = (self._places.page_tables[group], self._places.page_ids[group], self._places.offsets)
        out, self._k[array], self._v[array] = run(heads, sinks, (self._rows, *places))
        return out

    def _on_one_device(self, heads, sinks, where, **variant):
        q, k, v, k_pages, v_pages = heads
        rows, page_table, page_ids, offsets = where
        variant |= {"sinks": sinks, "implementation": self._implementation}
        k_pages = write_pages(k_pages, k, page_ids, offsets)
        if v_pages is None:
            variant["value_dim"] = v.shape[-1]
        else:
            v_pages = write_pages(v_pages, v, page_ids, offsets)
        if isinstance(rows, DecodeRows):
            out = paged_decode_attention(q[:, None], k_pages, v_pages, page_table, rows.lengths, **variant)[:, 0]
        else:
            out = paged_prefill_attention(
                q, k_pages, v_pages, page_table, rows.tiles, tile_size=self._tile_size, **variant
            )
        return out, k_pages, v_pages
