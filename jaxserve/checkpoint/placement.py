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
    filler = _Filler(on_bytes, sum(_bytes(plan, index) for plan in plans for index in _parts(plan)))
    # One keeps a disk busy while the other looks for NaN, even on one core.
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as filler.pool:
        arrays = (_kept if _on_host(plans) else _sent)(plans, filler)
    for name in filler.with_nan:
        logger.warning("tensor %r holds NaN, so that the model's output may be of no use; download it again", name)
    return arrays


class _Filler:
    """Threads that fill memory from the sources, and what has come of it."""

    pool: ThreadPoolExecutor

    def __init__(self, on_bytes: Callable[[int, int], None], total: int):
        self.with_nan: dict[str, None] = {}
        self._fill = fastest_fill()
        self._on_bytes, self._done, self._total = on_bytes, 0, total
        on_bytes(0, total)

    def begin(self, plan: Plan, parts: dict[tuple[slice, ...], np.ndarray]) -> list[Future]:
        """Fill the memory of some parts of a plan, in tasks that end after a few megabytes."""
        copies = (copy for index, memory in parts.items() for copy in overlaps(plan.sources, plan.shape, index, memory))
        return [self.pool.submit(self._fill, task) for task in _tasks(copies)]

    def end(self, tasks: list[Future], size: int) -> None:
        """Wait until what was begun is filled."""
        for task in tasks:
            self.with_nan.update(dict.fromkeys(task.result()))
        self._done += size
        self._on_bytes(self._done, self._total)


def _kept(plans: list[Plan], filler: _Filler) -> list[jax.Array]:
    """The arrays where they were filled: on the host nothing has to leave before the next comes."""
    source = _Memory(_HOST_CHUNK_BYTES, shared_below=_HOST_CHUNK_BYTES)
    memory, filling = [], []
    for plan in plans:
        memory.append({index: source.take(_shape(plan, index), plan.dtype) for index in _parts(plan)})
        filling.append(filler.begin(plan, memory[-1]))
    arrays = []
    for plan, parts, tasks in zip(plans, memory, filling, strict=True):
        filler.end(tasks, sum(part.nbytes for part in parts.values()))
        arrays.append(_array(plan, parts))
    return arrays


def _array(plan: Plan, parts: dict[tuple[slice, ...], np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(plan.shape, plan.sharding, lambda index: parts[index or ()], dtype=plan.dtype)


def _sent(plans: list[Plan], filler: _Filler) -> list[jax.Array]:
    """The arrays on their devices, to which each part goes as soon as others need its memory."""
    room = max((_bytes(plan, index) for plan in plans for index in _parts(plan)), default=0)
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
            filler.end(shard.tasks, shard.memory.nbytes)
            held -= shard.memory.nbytes
        pairs = [(shard, device) for shard in first for device in shard.devices]
        arrays = jax.device_put([shard.memory for shard, _ in pairs], [device for _, device in pairs])
        for (shard, _), array in zip(pairs, jax.block_until_ready(arrays), strict=True):
            placed[shard.plan].append(array)

    for number, plan in enumerate(plans):
        for index, devices in _parts(plan).items():
            size = _bytes(plan, index)
            while waiting and held + size > room:
                send(-(-len(waiting) // 2))
            held += size
            memory = source.take(_shape(plan, index), plan.dtype)
            waiting.append(_Shard(number, devices, memory, filler.begin(plan, {index: memory})))
            del memory
    send(len(waiting))
    return [
        jax.make_array_from_single_device_arrays(plan.shape, plan.sharding, arrays)
        for plan, arrays in zip(plans, placed, strict=True)
    ]


def _on_host(plans: list[Plan]) -> bool:
    devices: set[jax.Device] = set().union(*(plan.sharding.device_set for plan in plans))
    return all(device.platform == "cpu" for device in devices)


def _parts(plan: Plan) -> dict[tuple[slice, ...], list[jax.Device]]:
    """The parts that this process's devices hold, each with those that hold it."""
    parts: dict[tuple[slice, ...], list[jax.Device]] = {}
    for device, index in plan.sharding.addressable_devices_indices_map(plan.shape).items():
        parts.setdefault(index or (), []).append(device)
    return parts


def _shape(plan: Plan, index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(len(range(size)[part]) for size, part in zip(plan.shape, index, strict=True))


def _bytes(plan: Plan, index: tuple[slice, ...]) -> int:
    return math.prod(_shape(plan, index)) * plan.dtype.itemsize


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
