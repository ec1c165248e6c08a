"""Files mapped into memory, whose parts can be read as well: that is quicker than a copy of what is mapped."""

import mmap
import os
import weakref
from pathlib import Path

import numpy as np


class MappedFile(mmap.mmap):
    """A file mapped read-only. `ValueError` or `OSError` if there is nothing to map."""

    path: Path
    descriptor: int
    address: int  # of its first byte in memory

    def __new__(cls, path: Path) -> "MappedFile":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            mapped = super().__new__(cls, descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
        weakref.finalize(mapped, os.close, descriptor)
        mapped.path, mapped.descriptor = path, descriptor
        mapped.address = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
        return mapped


def file_of(array: np.ndarray) -> MappedFile | None:
    """The mapped file that `array` is a view of, if it is of one."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, MappedFile) else None
