"""How much of a device's memory the engine takes, and how many pages fit into it."""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # what tells whether JAX has started is public nowhere

from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.runner.buckets import Buckets

_CPU_CACHE_BYTES = 4 * 2**30
_GIB = 2**30
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")

# JAX reads these when it starts; the second is the first one's former name.
_RESERVED_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_RESERVED_BY_DEFAULT = 0.75


def reserve_gpu_memory(share: float) -> None:
    """Let JAX reserve `share` of each GPU's memory, if it has not started yet and nobody else has said how much.

    JAX reserves once, when it is first asked for a device, and three quarters by default. It has no setting for that
    but an environment variable.
    """
    if not xla_bridge.backends_are_initialized() and not any(os.environ.get(name) for name in _RESERVED_SHARE):
        os.environ[_RESERVED_SHARE[0]] = str(share)


def _reserved_share() -> float:
    """The share of each GPU's memory that JAX has reserved."""
    return next((float(os.environ[name]) for name in _RESERVED_SHARE if os.environ.get(name)), _RESERVED_BY_DEFAULT)


def _stats(device: jax.Device) -> dict[str, int] | None:
    """What is known of an accelerator's memory."""
    return device.memory_stats() if device.platform != "cpu" else None


def _host_bytes() -> int:
    """The machine's memory, or what a container may have of it."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # it is not there, or says "max"
            there = min(there, int(file.read_text()))
    return there


def _of_the_system(name: str) -> int:
    """Bytes of one of the numbers that Linux gives of its memory; 0 where there is none."""
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


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

    On an accelerator that is its memory times `utilization`, within what JAX has reserved and nothing occupies, less
    weights, which are still to come, and the programs' working memory (bytes over all `devices`); on a CPU a quarter of
    the machine's memory, and 4 GiB at most.
    """
    stats = _stats(device)
    if stats is None:
        weight_bytes = working_bytes = 0
        memory = min(_CPU_CACHE_BYTES, _host_bytes() // 4)
    else:
        reserved = stats["bytes_limit"]
        asked = int(reserved / _reserved_share() * utilization)
        if asked > reserved + _GIB // 16:  # more than what the shares' rounding explains
            warnings.warn(
                f"gpu_memory_utilization={utilization} asks for {asked / _GIB:.1f} GiB of each GPU and JAX has "
                f"reserved {reserved / _GIB:.1f}; unset {_RESERVED_SHARE[0]}, or start the engine before anything "
                "else uses JAX",
                stacklevel=2,
            )
        memory = min(asked, reserved - stats["bytes_in_use"]) * devices
    pages = pages_within(
        memory, page_bytes=page_bytes, wanted=wanted, weight_bytes=weight_bytes, working_bytes=working_bytes
    )
    if pages < 1:
        raise InputError(
            f"no page of {page_bytes / 2**20:.1f} MiB fits beside {weight_bytes / _GIB:.1f} GiB of weights and "
            f"{working_bytes / _GIB:.1f} GiB of working memory; use more devices or a smaller model, "
            "or raise gpu_memory_utilization"
        )
    return pages


def pages_within(memory: int, *, page_bytes: int, wanted: int, weight_bytes: int, working_bytes: int) -> int:
    """As many of the `wanted` pages as `memory` holds beside the rest; below 1 if none. Bytes are over all devices."""
    return min(wanted, (memory - weight_bytes - working_bytes) // page_bytes)


def step_weight_bytes(config: ModelConfig, weights: Any) -> int:
    """Bytes of the parameters that every step reads: all but an untied embedding table, of which it reads rows."""
    return array_bytes(weights) - (0 if config.tie_word_embeddings else array_bytes(weights["embedding"]))


def check_state(state: Any, weights: Any, devices: np.ndarray, *, num_pages: int, max_num_seqs: int) -> None:
    """`InputError` if arrays of these shapes are more than all memory, so that nobody begins to fill it with them.

    What is free of a CPU's is an estimate that others change meanwhile: beyond it there is a warning only. Other
    processes' machines are taken to be as this one.
    """
    wanted = array_bytes(state) + array_bytes(weights)
    own = [device for device in devices.flat if device.process_index == jax.process_index()]
    hosts = devices.size // len(own)
    stats = _stats(own[0])
    if stats is None:
        there = hosts * (_host_bytes() + _of_the_system("SwapTotal"))
    else:
        there = stats["bytes_limit"] * devices.size
    if wanted > there:
        told = f"there are {there / _GIB:.1f} GiB of memory"
        raise too_large(state, weights, told, num_pages=num_pages, max_num_seqs=max_num_seqs)
    free = hosts * (_of_the_system("MemAvailable") + _of_the_system("SwapFree"))
    if stats is None and 0 < free < wanted:
        warnings.warn(
            f"weights and pages take {wanted / _GIB:.1f} GiB and some {free / _GIB:.1f} GiB of memory are free; lower "
            "num_pages, or end other programs, if the system ends this one",
            stacklevel=2,
        )


def too_large(state: Any, weights: Any, told: str, *, num_pages: int, max_num_seqs: int) -> InputError:
    """The error of a state that there is no memory for."""
    return InputError(
        f"num_pages={num_pages} and max_num_seqs={max_num_seqs} take {array_bytes(state) / _GIB:.1f} GiB beside "
        f"{array_bytes(weights) / _GIB:.1f} GiB of weights, and {told}; lower what is too large of them"
    )


def working_bytes(config: ModelConfig, buckets: Buckets, item_bytes: int) -> int:
    """An upper estimate of a step's intermediate arrays, logits in float32 included, over all devices."""
    tokens, rows = buckets.prefill[-1].tokens, max(buckets.prefill[-1].rows, buckets.decode[-1])
    activations = tokens * (4 * config.hidden_size + config.mlp_numbers) * (item_bytes + 4)
    return activations + 6 * rows * config.vocab_size * 4 + buckets.max_num_seqs * config.vocab_size * 9
