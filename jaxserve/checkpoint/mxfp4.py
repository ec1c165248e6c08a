"""Weights of four bits with a scale for every 32 (Open Compute Project, 2023: Microscaling Formats, MXFP4)."""

from typing import Any

import numpy as np

_BLOCK = 32  # numbers that share a scale
_NUMBERS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_NUMBERS, -_NUMBERS])
_PAIRS = np.stack([_NUMBERS[np.arange(256) & 15], _NUMBERS[np.arange(256) >> 4]], axis=-1)  # a byte's low half first


class Mxfp4:
    """A packed matrix `[out, in]`, in the ways that a numpy array is sliced and read; float32, which holds it exactly.

    `blocks` uint8 `[out, in / 32, 16]`, two numbers in a byte; `scales` uint8 `[out, in / 32]`, exponents of two that
    are offset by 127. `columns` is the part of the second axis that is meant.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, blocks: np.ndarray, scales: np.ndarray, columns: range | None = None):
        self._blocks, self._scales = blocks, scales
        self._columns = range(blocks.shape[1] * _BLOCK) if columns is None else columns

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._blocks), len(self._columns)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "Mxfp4":
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        return Mxfp4(self._blocks[rows], self._scales[rows], self._columns[columns])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        first, last = self._columns.start // _BLOCK, -(-self._columns.stop // _BLOCK)
        exponents = self._scales[:, first:last].astype(np.int32) - 127
        blocks = _PAIRS[self._blocks[:, first:last]].reshape(len(self), last - first, _BLOCK)
        values = np.ldexp(blocks, exponents[..., None]).reshape(len(self), (last - first) * _BLOCK)
        values = values[:, self._columns.start - first * _BLOCK :][:, : len(self._columns)]
        return values if dtype is None else values.astype(dtype)
