"""Paged attention: checks what it is given and runs the implementation that the device has.

Pages hold what they are read as. Quantised ones will come with their scales, as arguments of their own beside
`k_pages` and `v_pages`, and as a dtype of pages in `AttentionShape`.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.implementations import AUTO, MOSAIC_GPU, NATIVE, Choice, choose, log_once
from pallas_kernels.mosaic_gpu.refusals import refuse_decode, refuse_prefill
from pallas_kernels.native import paged_attention as native
from pallas_kernels.xla import paged_attention as xla


def choose_decode(implementation: str, shape: AttentionShape, device: jax.Device | None = None) -> Choice:
    """What `paged_decode_attention` runs for `implementation`, and why. `ValueError` for what it does not take."""
    return _choose(implementation, {MOSAIC_GPU: refuse_decode(shape), NATIVE: native.refuse(shape)}, shape, device)


def choose_prefill(implementation: str, shape: AttentionShape, device: jax.Device | None = None) -> Choice:
    """What `paged_prefill_attention` runs for `implementation`, and why. `ValueError` for what it does not take."""
    return _choose(implementation, {MOSAIC_GPU: refuse_prefill(shape), NATIVE: native.refuse(shape)}, shape, device)


def _choose(
    implementation: str, refusals: dict[str, str | None], shape: AttentionShape, device: jax.Device | None
) -> Choice:
    if not shape.value_dim:
        refusals = dict.fromkeys(
            refusals, "values are the first numbers of their keys, which only XLA's attention reads"
        )
    return choose(implementation, refusals, device)


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    value_dim: int | None = None,
    implementation: str = AUTO,
) -> jax.Array:
    """`pallas_kernels.xla.paged_attention.paged_decode_attention`, by one of `IMPLEMENTATIONS`.

    `ValueError` for arguments that do not fit each other and, unless `implementation` is "auto", for shapes and dtypes
    that the one asked for does not take; "auto" runs those in XLA, and logs it once.
    """
    variant: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    if v_pages is None:
        variant["value_dim"] = value_dim
    batch, queries = q.shape[0], q.shape[1]
    _check_shape("lengths", lengths.shape, (batch,))
    _check_shape("the page table", page_table.shape, (batch, page_table.shape[-1]))
    choice = choose_decode(implementation, _shape(q, k_pages, v_pages, window, sinks, queries=queries))
    if choice.refused:
        log_once(f"decode attention runs in XLA: {choice.reason}")
    run: Callable[..., jax.Array] = xla.paged_decode_attention
    if choice.implementation == NATIVE:
        run = native.paged_decode_attention
    if choice.implementation == MOSAIC_GPU:
        from pallas_kernels.mosaic_gpu.decode import paged_decode_attention as run  # on demand: it brings Pallas
    return run(q, k_pages, v_pages, page_table, lengths, **variant)


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    page_table: jax.Array,
    tiles: jax.Array,
    *,
    tile_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    value_dim: int | None = None,
    implementation: str = AUTO,
) -> jax.Array:
    """`pallas_kernels.xla.paged_attention.paged_prefill_attention`, by one of `IMPLEMENTATIONS`.

    Errors and "auto" are `paged_decode_attention`'s.
    """
    variant: dict[str, Any] = {
        "tile_size": tile_size,
        "scale": scale,
        "window": window,
        "soft_cap": soft_cap,
        "sinks": sinks,
    }
    if v_pages is None:
        variant["value_dim"] = value_dim
    _check_shape("tiles", tiles.shape, (4, tiles.shape[-1]))
    choice = choose_prefill(implementation, _shape(q, k_pages, v_pages, window, sinks, tile_size=tile_size))
    if choice.refused:
        log_once(f"prefill attention runs in XLA: {choice.reason}")
    run: Callable[..., jax.Array] = xla.paged_prefill_attention
    if choice.implementation == NATIVE:
        run = native.paged_prefill_attention
    if choice.implementation == MOSAIC_GPU:
        from pallas_kernels.mosaic_gpu.prefill import paged_prefill_attention as run
    return run(q, k_pages, v_pages, page_table, tiles, **variant)


def _shape(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    window: int | None,
    sinks: jax.Array | None,
    *,
    queries: int = 1,
    tile_size: int = 0,
) -> AttentionShape:
    """The arguments' sizes; `ValueError` where they do not fit each other. Without pages of values, their size is 0."""
    heads, head_dim = q.shape[-2:]
    pages, kv_heads, page_size, _ = (k_pages if v_pages is None else v_pages).shape
    value_dim = 0 if v_pages is None else v_pages.shape[-1]
    _check_shape("k_pages", k_pages.shape, (pages, kv_heads, page_size, head_dim))
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads; give a multiple of the KV heads")
    if v_pages is not None and k_pages.dtype != v_pages.dtype:
        raise ValueError(f"k_pages are {k_pages.dtype} and v_pages {v_pages.dtype}; give one dtype")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}; give at least 1, or None for all positions")
    if sinks is not None:
        _check_shape("sinks", sinks.shape, (heads,))
    dtype = k_pages.dtype.name if q.dtype == k_pages.dtype else f"{q.dtype} for queries and {k_pages.dtype} for pages"
    return AttentionShape(heads, kv_heads, head_dim, value_dim, page_size, dtype, queries, tile_size)


def _check_shape(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise ValueError(f"the shape of {name} is {given}, and with the other arguments it has to be {wanted}")
