"""Weights in FP8 with a scale for every block of a matrix, as DeepSeek-V3 brought them up (arXiv:2412.19437)."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoint.lazy_rows import LazyRows
from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.models.config import Fp8Blocks

_SCALE = "_scale_inv"  # behind the name of a tensor of blocks: what its numbers are multiplied by


class Fp8Directory(SafetensorsDirectory):
    """A directory whose tensors in FP8 are unpacked when they are read."""

    def __init__(self, directory: Path, blocks: Fp8Blocks):
        super().__init__(directory)
        self._block = blocks.rows, blocks.columns

    def names(self) -> list[str]:
        return [name for name in super().names() if not name.endswith(_SCALE)]

    def tensor(self, name: str) -> Any:
        tensor = super().tensor(name)
        if tensor.dtype.itemsize > 1:
            return tensor
        scales = super().tensor(name + _SCALE)
        expected = tuple(-(-size // own) for size, own in zip(tensor.shape, self._block, strict=True))
        if scales.shape != expected:
            raise InputError(
                f"tensor {name + _SCALE!r} has shape {list(scales.shape)}, and for blocks of {list(self._block)} of "
                f"{name!r} it is {list(expected)}; they do not belong together"
            )
        return unpacked(tensor, scales, self._block)


def unpacked(numbers: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> LazyRows:
    """A matrix `[out, in]` in float32: `numbers` of the same shape times `scales` `[out / block[0], in / block[1]]`."""
    rows = np.arange(len(numbers))[:, None] // block[0]
    make = partial(_unpack, scales.astype(np.float32), block[1])
    return LazyRows(make, [numbers, rows], range(numbers.shape[1]))


def _unpack(scales: np.ndarray, block: int, parts: list[np.ndarray], columns: range) -> np.ndarray:
    numbers, rows = parts
    own = scales[rows[..., 0]][..., np.asarray(columns) // block]
    return numbers[..., columns.start : columns.stop].astype(np.float32) * own
