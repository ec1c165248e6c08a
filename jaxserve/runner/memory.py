"""How many pages fit."""

import os
from typing import Any

import jax

from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.runner.buckets import Buckets

_CPU_CACHE_BYTES = 4 * 2**30
_GIB = 2**30


def array_bytes(arrays: Any) -> int:
    """Bytes of all arrays of a tree, or of the shapes of some, over all devices."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))


def plan_pages(
    *,
    page_bytes: int,
    wanted: int,
    device: jax.Device,
    devices: int,
    utilization: float,
    weight_bytes: int,
    working_bytes: int,
) -> int:
    """Pages for the page pool: `wanted` at most, and what memory allows.

    On an accelerator that is its memory times `utilization`, less weights and the programs' working memory (bytes over
    all `devices`); on a CPU a quarter of the machine's memory, and 4 GiB at most.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is None:
        budget = min(_CPU_CACHE_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    else:
        budget = int(stats["bytes_limit"] * utilization) * devices - weight_bytes - working_bytes
    fitting = budget // page_bytes
    if fitting < 1:
        raise InputError(
            f"no page of {page_bytes / 2**20:.1f} MiB fits beside {weight_bytes / _GIB:.1f} GiB of weights and "
            f"{working_bytes / _GIB:.1f} GiB of working memory; use more devices or a smaller model, "
            "or raise gpu_memory_utilization"
        )
    return min(wanted, fitting)


def working_bytes(config: ModelConfig, buckets: Buckets, item_bytes: int) -> int:
    """An upper estimate of a step's intermediate arrays, logits in float32 included, over all devices."""
    tokens, rows = buckets.prefill[-1].tokens, max(buckets.prefill[-1].rows, buckets.decode[-1])
    activations = tokens * (4 * config.hidden_size + 3 * config.intermediate_size) * (item_bytes + 4)
    return activations + 6 * rows * config.vocab_size * 4 + buckets.max_num_seqs * config.vocab_size * 9
