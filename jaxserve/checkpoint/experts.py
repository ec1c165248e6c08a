"""The tensors of each expert, however a checkpoint holds them: one by one, all in one, or packed in four bits."""

from typing import Any

import numpy as np

from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError

_MXFP4_BLOCK = 32  # numbers that share a scale
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4_PAIRS = np.stack(  # of every byte: the number in its low half, then the one in its high half
    [np.concatenate([_FP4, -_FP4])[np.arange(256) & 15], np.concatenate([_FP4, -_FP4])[np.arange(256) >> 4]], axis=-1
)


def expert_tensors(files: SafetensorsDirectory, name: str, experts: int) -> tuple[list[Any], list[str]]:
    """What `name` stands for as lazy tensors `[out, in]` or `[out]`, one for each expert, and the names used for it.

    A `name` with a place `{}` for the expert's number is a tensor for each. Without, it is one tensor of all:
    `[experts, in, out]` or `[experts, out]`, or MXFP4 (Open Compute Project, 2023) as `name_blocks` and `name_scales`.
    """
    if "{}" in name:
        names = [name.format(expert) for expert in range(experts)]
        return [files.tensor(each) for each in names], names
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if blocks in files.names():
        packed = _Mxfp4(files.tensor(blocks), files.tensor(scales), name)
        return [_Expert(packed, expert, experts, name) for expert in range(experts)], [blocks, scales]
    whole = files.tensor(name)
    if len(whole.get_shape()) == 3:
        whole = _Transposed(whole)
    return [_Expert(whole, expert, experts, name) for expert in range(experts)], [name]


class _Expert:
    """One entry of the first axis of a lazy tensor."""

    def __init__(self, tensor: Any, expert: int, experts: int, name: str):
        found, *self._shape = tensor.get_shape()
        if found != experts:
            raise InputError(f"tensor {name!r} is of {found} experts, and by config.json there are {experts}")
        self._tensor, self._expert = tensor, expert

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensor[(slice(self._expert, self._expert + 1), *index)][0]


class _Transposed:
    """A lazy tensor `[experts, in, out]` as `[experts, out, in]`."""

    def __init__(self, tensor: Any):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        experts, in_features, out_features = self._tensor.get_shape()
        return [experts, out_features, in_features]

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, rows, columns = index
        return self._tensor[experts, columns, rows].swapaxes(1, 2)


class _Mxfp4:
    """Lazy `[experts, out, in]` of uint8 `blocks` `[experts, out, in / 32, 16]` and `scales` `[experts, out, in / 32]`.

    Each byte is two numbers of four bits, the low half first; a scale is an exponent of two, offset by 127.
    """

    def __init__(self, blocks: Any, scales: Any, name: str):
        self._blocks, self._scales = blocks, scales
        shape = blocks.get_shape()
        if shape != [*scales.get_shape(), _MXFP4_BLOCK // 2]:
            raise InputError(
                f"tensor '{name}_blocks' has shape {shape} and '{name}_scales' {scales.get_shape()}, "
                "which do not belong together"
            )

    def get_shape(self) -> list[int]:
        experts, out_features, blocks, _ = self._blocks.get_shape()
        return [experts, out_features, blocks * _MXFP4_BLOCK]

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, rows, columns = index
        start, stop, _ = columns.indices(self.get_shape()[2])
        first, last = start // _MXFP4_BLOCK, -(-stop // _MXFP4_BLOCK)
        packed = self._blocks[experts, rows, first:last, :]
        exponents = self._scales[experts, rows, first:last].astype(np.int32) - 127
        values = np.ldexp(_FP4_PAIRS[packed].reshape(*packed.shape[:-1], _MXFP4_BLOCK), exponents[..., None])
        values = values.reshape(*values.shape[:-2], -1)
        return values[..., start - first * _MXFP4_BLOCK : stop - first * _MXFP4_BLOCK]
