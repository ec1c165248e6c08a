"""Weights of four bits with a scale for every 32 (Open Compute Project, 2023: Microscaling Formats, MXFP4)."""

import numpy as np

from jaxserve.checkpoint.lazy_rows import LazyRows

_BLOCK = 32  # numbers that share a scale
_NUMBERS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_NUMBERS, -_NUMBERS])
_PAIRS = np.stack([_NUMBERS[np.arange(256) & 15], _NUMBERS[np.arange(256) >> 4]], axis=-1)  # a byte's low half first


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> LazyRows:
    """A packed matrix `[out, in]` in float32, which holds it exactly.

    `blocks` uint8 `[out, in / 32, 16]`, two numbers in a byte; `scales` uint8 `[out, in / 32]`, exponents of two that
    are offset by 127.
    """
    packed = blocks.reshape(*blocks.shape[:-2], -1)
    return LazyRows(_unpack, [packed, scales], range(scales.shape[-1] * _BLOCK))


def _unpack(parts: list[np.ndarray], columns: range) -> np.ndarray:
    packed, scales = parts
    first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
    exponents = scales[..., first:last].astype(np.int32) - 127
    blocks = _PAIRS[packed[..., first * _BLOCK // 2 : last * _BLOCK // 2]].reshape(*exponents.shape, _BLOCK)
    values = np.ldexp(blocks, exponents[..., None]).reshape(*exponents.shape[:-1], (last - first) * _BLOCK)
    return values[..., columns.start - first * _BLOCK :][..., : len(columns)]
