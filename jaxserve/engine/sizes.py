"""What a model's steps and pages take, by its settings: for the engine that starts, and for GPUs that are not there."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.runner.buckets import MIN_DECODE_ROWS, TILE_SIZE, Buckets
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.kv_cache import page_bytes
from jaxserve.runner.memory import working_bytes


class Defaults(NamedTuple):
    """Of settings that depend on the device and were left open."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_decode_steps: int


ON_CPU = Defaults(32, 512, 8)
ON_GPU = Defaults(256, 4096, 1)  # a loop of unknown length makes a GPU wait for the host in each round


class Sizes(NamedTuple):
    """Bytes are over all devices."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    buckets: Buckets
    layout: CacheLayout
    page_bytes: int
    wanted_pages: int  # by all sequences together, each as long as it may be
    working_bytes: int


def sizes_of(
    config: EngineConfig,
    model: ModelConfig,
    dtype: jnp.dtype,
    defaults: Defaults,
    *,
    min_decode_rows: int = MIN_DECODE_ROWS,
    smallest_tile: int = TILE_SIZE,
    mixed: bool = False,
) -> Sizes:
    """The sizes of `model` as it stands on its devices; `InputError` if it has too few positions for `config`."""
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    max_num_batched_tokens = config.max_num_batched_tokens or defaults.max_num_batched_tokens
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise InputError(
            f"max_model_len={max_model_len} is more than the {model.max_position_embeddings} positions "
            "that this model was made for; lower it"
        )
    buckets = Buckets.of(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=min(max_num_batched_tokens, max_model_len * max_num_seqs),
        max_model_len=max_model_len,
        page_size=config.page_size,
        min_decode_rows=min_decode_rows,
        smallest_tile=smallest_tile,
        mixed=mixed,
    )
    layout = CacheLayout.of(
        [kind.window for kind in model.layer_kinds],
        page_size=config.page_size,
        max_step_tokens=buckets.prefill[-1].tokens,
        max_model_len=max_model_len,
    )
    return Sizes(
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        buckets,
        layout,
        page_bytes(model, layout, dtype),
        max_num_seqs * layout.pages_of(max_model_len),
        working_bytes(model, buckets, dtype.itemsize),
    )
