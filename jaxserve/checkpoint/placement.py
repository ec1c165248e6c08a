"""Arrays on a mesh from memory-mapped files: each device's part is filled by many threads and placed directly."""

import logging
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxserve.checkpoint.filling import Copy, cut, fastest_fill
from jaxserve.checkpoint.fusing import Source, Sources, overlaps

logger = logging.getLogger(__name__)

_TASK_BYTES = 16 * 2**20  # that a thread takes at a time
_HUGE_PAGE_BYTES, _CHUNK_BYTES = 2 * 2**20, 32 * 2**20
_HOST_CHUNK_BYTES = 256 * 2**20
_ALIGNMENT = 64  # XLA on the CPU uses memory so aligned where it lies, and copies any other


class Plan(NamedTuple):
    """One array to make: of which shape and dtype, how split, and out of what."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    sources: Sources


class _Part(NamedTuple):
    """What some devices of this process hold of a plan's array, all of them the same."""

    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    bytes: int
    devices: list[jax.Device]


class _Shard(NamedTuple):
    plan: int
    devices: list[jax.Device]
    memory: np.ndarray
    tasks: list[Future]


def place(plans: list[Plan], on_bytes: Callable[[int, int], None] = lambda done, total: None) -> list[jax.Array]:
    """The arrays of `plans`. Host memory stays within the largest shard and 32 MiB. Where the arrays are on the host,
    it is theirs and up to a huge page for each 256 MiB.

    A tensor that holds NaN is warned of by name. `on_bytes` is told how many bytes of how many are in place.
    """
    parts = [_parts(plan) for plan in plans]
    filling = _Filling(on_bytes, sum(part.bytes for own in parts for part in own))
    # One keeps a disk busy while the other looks for NaN, even on one core.
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as filling.pool:
        arrays = (_kept if _on_host(plans) else _sent)(plans, parts, filling)
    for name in filling.with_nan:
        logger.warning("tensor %r holds NaN, so that the model's output may be of no use; download it again", name)
    return arrays


class _Filling:
    """Threads that fill memory from the sources, and what has come of it."""

    pool: ThreadPoolExecutor

    def __init__(self, on_bytes: Callable[[int, int], None], total: int):
        self.with_nan: dict[str, None] = {}
        self._fill = fastest_fill()
        self._on_bytes, self._done, self._total = on_bytes, 0, total
        on_bytes(0, total)

    def begin(self, plan: Plan, parts: list[_Part], memory: list[np.ndarray]) -> list[Future]:
        """Fill the memory of some parts of a plan, in tasks that end after a few megabytes."""
        filled = zip(parts, memory, strict=True)
        copies = (copy for part, own in filled for copy in overlaps(plan.sources, plan.shape, part.slices, own))
        return [self.pool.submit(self._fill, task) for task in _tasks(copies)]

    def end(self, tasks: list[Future], size: int) -> None:
        """Wait until what was begun is filled."""
        for task in tasks:
            self.with_nan.update(dict.fromkeys(task.result()))
        self._done += size
        self._on_bytes(self._done, self._total)


def _kept(plans: list[Plan], parts: list[list[_Part]], filling: _Filling) -> list[jax.Array]:
    """The arrays where they were filled: on the host nothing has to leave before the next comes."""
    source = _Memory(_HOST_CHUNK_BYTES, shared_below=_HOST_CHUNK_BYTES)
    memory, begun = [], []
    for plan, own in zip(plans, parts, strict=True):
        memory.append([source.take(part.shape, plan.dtype) for part in own])
        begun.append(filling.begin(plan, own, memory[-1]))
    arrays = []
    for plan, own, rows, tasks in zip(plans, parts, memory, begun, strict=True):
        filling.end(tasks, sum(part.bytes for part in own))
        arrays.append(_array(plan, {part.slices: each for part, each in zip(own, rows, strict=True)}))
    return arrays


def _array(plan: Plan, parts: dict[tuple[slice, ...], np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(plan.shape, plan.sharding, lambda index: parts[index or ()], dtype=plan.dtype)


def _sent(plans: list[Plan], parts: list[list[_Part]], filling: _Filling) -> list[jax.Array]:
    """The arrays on their devices, to which each part goes as soon as others need its memory."""
    room = max((part.bytes for own in parts for part in own), default=0)
    source = _Memory(_CHUNK_BYTES, shared_below=_HUGE_PAGE_BYTES)
    placed: list[list[jax.Array]] = [[] for _ in plans]
    waiting: list[_Shard] = []
    held = 0

    def send(count: int) -> None:
        """Give the first that wait to their devices, all at once: for each alone that takes three times as long."""
        nonlocal held
        first = waiting[:count]
        del waiting[:count]
        for shard in first:
            filling.end(shard.tasks, shard.memory.nbytes)
            held -= shard.memory.nbytes
        pairs = [(shard, device) for shard in first for device in shard.devices]
        arrays = jax.device_put([shard.memory for shard, _ in pairs], [device for _, device in pairs])
        for (shard, _), array in zip(pairs, jax.block_until_ready(arrays), strict=True):
            placed[shard.plan].append(array)

    for number, (plan, own) in enumerate(zip(plans, parts, strict=True)):
        for part in own:
            while waiting and held + part.bytes > room:
                send(-(-len(waiting) // 2))
            held += part.bytes
            memory = source.take(part.shape, plan.dtype)
            waiting.append(_Shard(number, part.devices, memory, filling.begin(plan, [part], [memory])))
            del memory
    send(len(waiting))
    return [
        jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, arrays)
        for plan, arrays in zip(plans, placed, strict=True)
    ]


def _on_host(plans: list[Plan]) -> bool:
    devices: set[jax.Device] = set().union(*(plan.sharding.device_set for plan in plans))
    return all(device.platform == "cpu" for device in devices)


def _parts(plan: Plan) -> list[_Part]:
    """The parts that this process's devices hold, each once."""
    holders: dict[tuple[slice, ...], list[jax.Device]] = {}
    for device, index in plan.sharding.addressable_devices_indices_map(plan.shape).items():
        holders.setdefault(index or (), []).append(device)
    shape = plan.sharding.shard_shape(plan.shape)  # the same for all
    size = math.prod(shape) * plan.dtype.itemsize
    return [_Part(index, shape, size, devices) for index, devices in holders.items()]


class _Memory:
    """Zeroed host memory, aligned as XLA wants it, on huge pages: to get it on small ones takes three times as long.

    Arrays of fewer bytes than `shared_below` share chunks, each of which is given back with its last array.
    """

    def __init__(self, chunk_bytes: int, *, shared_below: int) -> None:
        self._chunk_bytes, self._shared_below = chunk_bytes, shared_below
        self._chunk, self._used = np.empty(0, np.uint8), 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if size >= self._shared_below:
            return _huge_pages(size).view(dtype).reshape(shape)
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _huge_pages(self._chunk_bytes), 0
        taken = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return taken.view(dtype).reshape(shape)


def _huge_pages(size: int) -> np.ndarray:
    pages = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE_BYTES
    return memory[start : start + size]


def _tasks(copies: Iterable[tuple[Source, np.ndarray, np.ndarray]]) -> Iterator[list[Copy]]:
    """The copies in lists of some megabytes, so that threads share them evenly and seldom wait for each other."""
    task: list[Copy] = []
    size = 0
    for source, target, rows in copies:
        for part in cut(target, _TASK_BYTES):
            task.append(Copy(source.name, target[part], rows[part]))
            size += target[part].nbytes
            if size >= _TASK_BYTES // 2:
                yield task
                task, size = [], 0
    if task:
        yield task
