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

from jaxserve.checkpoint.fusing import Source, Sources, overlaps
from jaxserve.checkpoint.mapped_file import file_of

logger = logging.getLogger(__name__)

# A thread takes a task at a time, and of that as much as its cache holds while it looks for NaN.
_TASK_BYTES, _CACHED_BYTES = 16 * 2**20, 2**21
_HUGE_PAGE_BYTES, _CHUNK_BYTES = 2 * 2**20, 32 * 2**20
_HOST_CHUNK_BYTES = 256 * 2**20
_ALIGNMENT = 64  # XLA on the CPU uses memory so aligned where it lies, and copies any other
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


class Plan(NamedTuple):
    """One array to make: of which shape and dtype, how split, and out of what."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    sources: Sources


_Copy = tuple[str, np.ndarray, np.ndarray]  # a tensor's name, rows of memory, and rows of that tensor to fill it with


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
        self._on_bytes, self._done, self._total = on_bytes, 0, total
        on_bytes(0, total)

    def begin(self, plan: Plan, parts: dict[tuple[slice, ...], np.ndarray]) -> list[Future]:
        """Fill the memory of some parts of a plan, in tasks that end after a few megabytes."""
        copies = (copy for index, memory in parts.items() for copy in overlaps(plan.sources, plan.shape, index, memory))
        return [self.pool.submit(_copy, task) for task in _tasks(copies)]

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
    for parts, tasks in zip(memory, filling, strict=True):
        filler.end(tasks, sum(part.nbytes for part in parts.values()))

    def array(plan: Plan, parts: dict[tuple[slice, ...], np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(
            plan.shape, plan.sharding, lambda index: parts[index or ()], dtype=plan.dtype
        )

    # Not before all are filled: at each, JAX would wait for the lock that the threads pass round.
    return [array(plan, parts) for plan, parts in zip(plans, memory, strict=True)]


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


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, as quick for the dtypes that numpy does not know itself."""
    source = np.asarray(source)  # packed numbers are unpacked here
    if target.dtype == source.dtype:
        file = file_of(source)
        if file is not None and source.flags.c_contiguous and target.ndim and target[:1].flags.c_contiguous:
            file.read_into(target, source)
            return
        bits = f"u{target.dtype.itemsize}"
        target, source = target.view(bits), source.view(bits)
    np.copyto(target, source, casting="unsafe")


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


def _tasks(copies: Iterable[tuple[Source, np.ndarray, np.ndarray]]) -> Iterator[list[_Copy]]:
    """The copies in lists of some megabytes, so that threads share them evenly and seldom wait for each other."""
    task: list[_Copy] = []
    size = 0
    for source, target, rows in copies:
        for part in _cut(target, _TASK_BYTES):
            task.append((source.name, target[part], rows[part]))
            size += target[part].nbytes
            if size >= _TASK_BYTES // 2:
                yield task
                task, size = [], 0
    if task:
        yield task


def _cut(array: np.ndarray, most_bytes: int) -> Iterator[slice]:
    """Slices of the first axis of at most that many bytes, and one row at least."""
    step = max(1, most_bytes * len(array) // max(array.nbytes, 1))
    return (slice(start, start + step) for start in range(0, len(array), step))


def _copy(task: list[_Copy]) -> list[str]:
    """Copy; the names come back of tensors in which there was NaN."""
    with_nan = []
    for name, target, source in task:
        for part in _cut(target, _CACHED_BYTES):
            copy(target[part], source[part])
            if _has_nan(target[part]):
                with_nan.append(name)
    return with_nan


def _has_nan(values: np.ndarray) -> bool:
    """Whether a NaN is among the numbers, of which it has the highest bits under either sign."""
    infinity = _INFINITY.get(values.dtype.name)
    if infinity is None:
        return False
    size = values.dtype.itemsize
    bits = values.view(f"u{size}")
    if not int(np.bitwise_or.reduce(bits, axis=None)) >> 8 * size - 2 & 1:
        return False  # all are below two, as weights mostly are, which takes half the time to see
    minus_infinity = infinity | 1 << 8 * size - 1
    return bool(values.view(f"i{size}").max() > infinity or bits.max() > minus_infinity)
