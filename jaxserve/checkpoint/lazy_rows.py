"""Parameters that are made when they are read, a few rows at a time, and are whole nowhere but in their place."""

from collections.abc import Callable
from typing import Any

import numpy as np

Make = Callable[[list[np.ndarray], Any], np.ndarray]  # of parts and columns


class LazyRows:
    """A matrix, or a stack of some, in the ways that a numpy array is sliced and read.

    `parts` are arrays `[..., any]` with the leading axes of the whole, of which `make(parts, columns)` makes
    `[..., columns]`; without `columns` a vector, a number of each row. Float32 unless `dtype` says otherwise.
    """

    def __init__(self, make: Make, parts: list[Any], columns: range | None, dtype: Any = np.float32):
        self._make, self._parts, self._columns = make, parts, columns
        self.dtype = np.dtype(dtype)
        leading = parts[0].shape[:-1]
        self.shape: tuple[int, ...] = leading if columns is None else (*leading, len(columns))
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | tuple[slice, ...]) -> "LazyRows":
        leading, columns = index if isinstance(index, tuple) else (index,), self._columns
        if columns is not None and isinstance(index, tuple) and len(index) == self.ndim:
            leading, columns = index[:-1], columns[index[-1]]
        return LazyRows(self._make, [part[leading] for part in self._parts], columns, self.dtype)

    def reshape(self, *shape: int) -> "LazyRows":
        """All sizes but the columns' may be others."""
        leading = shape if self._columns is None else shape[:-1]
        parts = [part.reshape(*leading, part.shape[-1]) for part in self._parts]
        return LazyRows(self._make, parts, self._columns, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        made = self._make([np.asarray(part) for part in self._parts], self._columns)
        return made if dtype is None else made.astype(dtype, copy=False)
