"""Files mapped into memory, whose parts can be read as well: a copy of a mapping costs a fault for every few pages."""

import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from jaxserve.errors import InputError

_MOST_BUFFERS = 1024  # that Linux takes in one call


class MappedFile(mmap.mmap):
    """A file mapped read-only. `ValueError` or `OSError` if there is nothing to map."""

    def __new__(cls, path: Path) -> "MappedFile":
        file = os.open(path, os.O_RDONLY)
        try:
            mapped = super().__new__(cls, file, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(file)
            raise
        weakref.finalize(mapped, os.close, file)
        mapped._path, mapped._file = path, file
        mapped._address = np.frombuffer(mapped, np.uint8).ctypes.data
        return mapped

    def __init__(self, path: Path):
        self._path: Path
        self._file: int
        self._address: int

    def read_into(self, target: np.ndarray, source: np.ndarray) -> None:
        """`target[...] = source`, where `source` is a contiguous part of this and the rows of `target` are, too."""
        rows = [target] if target.flags.c_contiguous else list(target)
        place = source.ctypes.data - self._address
        for start in range(0, len(rows), _MOST_BUFFERS):
            buffers = [memoryview(row.reshape(-1).view(np.uint8)) for row in rows[start : start + _MOST_BUFFERS]]
            while buffers:
                count = os.preadv(self._file, buffers, place)
                if not count:
                    raise InputError(f"{self._path} was cut off at byte {place} while it was read; download it again")
                place += count
                while buffers and count >= len(buffers[0]):
                    count -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][count:]


def file_of(array: np.ndarray) -> MappedFile | None:
    """The mapped file that `array` is a view of, if it is of one."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, MappedFile) else None
