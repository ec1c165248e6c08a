"""Memory filled with tensors, in which NaN is looked for meanwhile: in C++ without Python's lock, or by numpy."""

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.mapped_file import MappedFile, file_of
from jaxserve.errors import InputError
from pallas_kernels.native import library

_CACHED_BYTES = 2**20  # that numpy copies before it looks for NaN
_INFINITY = {np.dtype(jnp.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00, np.dtype(np.float32): 0x7F800000}

_log = logging.getLogger(__name__)


class Copy(NamedTuple):
    """Rows of memory, and those of the tensor `name` to fill them with."""

    name: str
    target: np.ndarray
    source: np.ndarray


Fill = Callable[[Sequence[Copy]], list[str]]  # does them; the names come back of tensors in which there was NaN


class _Rows(ctypes.Structure):
    """`Rows` of fill.cc."""

    _fields_ = (
        ("file", ctypes.c_int64),
        ("mapped", ctypes.c_void_p),
        ("place", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("source_stride", ctypes.c_int64),
        ("target_stride", ctypes.c_int64),
        ("number_bytes", ctypes.c_int64),
        ("infinity", ctypes.c_int64),
        ("has_nan", ctypes.c_int64),
    )


@functools.cache
def fastest_fill() -> Fill:
    """The quickest there is on this machine; the first call builds it."""
    try:
        native = ctypes.CDLL(str(library.built(Path(__file__).parent))).jaxserve_fill
    except (library.Unavailable, OSError) as error:
        _log.info("weights are copied by numpy, not by native code: %s", error)
        return by_numpy
    native.restype = ctypes.c_int64
    return functools.partial(_by_native, native)


def by_numpy(copies: Sequence[Copy]) -> list[str]:
    """`Fill` for any memory and any machine."""
    with_nan = []
    for name, target, source in copies:
        for part in cut(target, _CACHED_BYTES):
            assign(target[part], source[part])
            if _has_nan(target[part]):
                with_nan.append(name)
    return with_nan


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, as quick for the dtypes that numpy does not know itself."""
    source = np.asarray(source)  # packed numbers are unpacked here
    if target.dtype == source.dtype:
        bits = f"u{target.dtype.itemsize}"
        target, source = target.view(bits), source.view(bits)
    np.copyto(target, source, casting="unsafe")


def cut(array: np.ndarray, most_bytes: int) -> Iterator[slice]:
    """Slices of the first axis of at most that many bytes, and one row at least."""
    step = max(1, most_bytes * len(array) // max(array.nbytes, 1))
    return (slice(start, start + step) for start in range(0, len(array), step))


def _by_native(native: Callable[..., int], copies: Sequence[Copy]) -> list[str]:
    ours: list[tuple[str, MappedFile, _Rows]] = []
    others: list[Copy] = []
    for copy in copies:
        file = file_of(copy.source)
        rows = None if file is None else _rows(file, copy)
        if file is None or rows is None:
            others.append(copy)
        else:
            ours.append((copy.name, file, rows))
    parts = (_Rows * len(ours))(*(rows for _, _, rows in ours))
    failure = ctypes.c_int64()
    # One call for all, as other threads run Python meanwhile and give its lock back late.
    failed = native(parts, ctypes.c_int64(len(parts)), ctypes.byref(failure))
    if failed < len(parts):
        path, place = ours[failed][1].path, parts[failed].place
        if failure.value < 0:
            raise InputError(f"{path} was cut off at byte {place} while it was read; download it again")
        raise InputError(f"cannot read {path} at byte {place} ({os.strerror(failure.value)}); check the disk")
    return [name for (name, _, _), part in zip(ours, parts, strict=True) if part.has_nan] + by_numpy(others)


def _rows(file: MappedFile, copy: Copy) -> _Rows | None:
    """What the native code is told of a copy from `file`, in as few rows as possible; None if it is not for it."""
    _, target, source = copy
    if target.dtype != source.dtype:
        return None
    while len(target) == 1 and target.ndim > 1:
        target, source = target[0], source[0]
    if target.flags.c_contiguous and source.flags.c_contiguous:
        target, source = target.reshape(1, -1), source.reshape(1, -1)
    if not target[:1].flags.c_contiguous or not source[:1].flags.c_contiguous:
        return None
    infinity = _INFINITY.get(target.dtype)
    mapped = source.__array_interface__["data"][0]
    return _Rows(
        file=file.descriptor,
        mapped=mapped,
        place=mapped - file.address,
        target=target.__array_interface__["data"][0],
        count=len(target),
        bytes=target[:1].nbytes,
        source_stride=source.strides[0],
        target_stride=target.strides[0],
        number_bytes=0 if infinity is None else target.dtype.itemsize,
        infinity=infinity or 0,
    )


def _has_nan(values: np.ndarray) -> bool:
    """Whether a NaN is among the numbers, of which it has the highest bits under either sign."""
    infinity = _INFINITY.get(values.dtype)
    if infinity is None or not values.size:
        return False
    size = values.dtype.itemsize
    minus_infinity = infinity | 1 << 8 * size - 1
    return bool(values.view(f"i{size}").max() > infinity or values.view(f"u{size}").max() > minus_infinity)
