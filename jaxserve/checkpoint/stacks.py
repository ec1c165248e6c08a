"""Parameters that stack the matrices of many experts or heads, and how checkpoints hold those.

A stacked parameter's metadata `stacked` is a `Stack`; its first axis counts the matrices, of each of which `parts` and
the names hold.
"""

from typing import Any

import numpy as np

from jaxserve.checkpoint import mxfp4
from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.layers.linear import Stack


def stacked_tensors(
    files: SafetensorsDirectory, name: str, stack: Stack, shape: tuple[int, ...]
) -> tuple[list[Any], list[str]]:
    """The rows of each entry of a parameter of `shape` that `name` stands for, and the names of the tensors used.

    A `name` with a place `{}` for the entry's number is a tensor for each. Without, it is one tensor of all, which may
    be packed as MXFP4 in `name_blocks` and `name_scales`.
    """
    count = shape[0]
    if "{}" in name:
        names = [name.format(entry) for entry in range(count)]
        return [files.tensor(each) for each in names], names
    if f"{name}_blocks" in files.names():
        names = [f"{name}_blocks", f"{name}_scales"]
        blocks, scales = (files.tensor(each) for each in names)
        if blocks.shape[:-1] != scales.shape or blocks.ndim != 4:
            raise InputError(
                f"tensor {names[0]!r} has shape {list(blocks.shape)} and {names[1]!r} {list(scales.shape)}, "
                "which do not belong together"
            )
        return [mxfp4.unpacked(*entry) for entry in zip(*_of_all(names[0], blocks, count, scales), strict=True)], names
    tensor = files.tensor(name)
    if stack.block:
        if len(tensor) != count * stack.block:
            raise InputError(
                f"tensor {name!r} has {len(tensor)} rows, and by config.json {count * stack.block}; "
                "they do not belong together"
            )
        blocks = tensor.reshape(count, stack.block, *tensor.shape[1:])
        return list(blocks[:, stack.first : stack.first + shape[1]]), [name]
    (tensor,) = _of_all(name, tensor, count)
    return list(tensor.swapaxes(1, 2) if tensor.ndim == 3 else tensor), [name]


def unstack(tensors: dict[str, np.ndarray], name: str, stack: Stack, rows: np.ndarray) -> None:
    """Put `rows` `[entries, ...]` into `tensors` where a checkpoint holds them in one tensor `name`."""
    if stack.block:
        shape = (len(rows) * stack.block, *rows.shape[2:])
        blocks = tensors.setdefault(name, np.zeros(shape, rows.dtype)).reshape(len(rows), stack.block, *rows.shape[2:])
        blocks[:, stack.first : stack.first + rows.shape[1]] = rows
    else:
        tensors[name] = rows.swapaxes(1, 2) if rows.ndim == 3 else rows


def _of_all(name: str, tensor: np.ndarray, count: int, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    if len(tensor) != count:
        raise InputError(
            f"tensor {name!r} has shape {list(tensor.shape)}, and by config.json its first size is {count}; "
            "they do not belong together"
        )
    return (tensor, *others)
