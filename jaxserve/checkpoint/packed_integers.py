"""Integers of four or eight bits packed into 32, with scales for groups of a row; unpacked or repacked as they come.

As GPTQ (Frantar et al., 2022, arXiv:2210.17323), AWQ (Lin et al., 2023, arXiv:2306.00978) and compressed-tensors write
them. A weight is `(number - zero) * scale`; numbers and zeros have no sign.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoint.lazy_rows import LazyRows
from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.layers.quantisation import Quantised, packed
from jaxserve.models.config import PackedIntegers

# The tensors in a weight's place: numbers first, then zeros, scales, each column's group, and what nobody needs.
_PARTS = {
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "compressed-tensors": (
        *(".weight_packed", ".weight_zero_point", ".weight_scale", ".weight_g_idx"),
        ".weight_shape",
    ),
}
_WORD_BITS = 32
_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # in a word, of outputs that are neighbours


class PackedDirectory(SafetensorsDirectory):
    """A directory whose `weight` tensors are made of what stands in their place."""

    def __init__(self, directory: Path, packing: PackedIntegers):
        super().__init__(directory)
        self._packing, self._parts = packing, _PARTS[packing.layout]
        self._stored = dict.fromkeys(super().names())
        self._names = [name for name in map(self._shown, self._stored) if name is not None]

    def names(self) -> list[str]:
        return self._names

    def _shown(self, name: str) -> str | None:
        """The tensor that `name` is, or makes, or None if it belongs to another."""
        layer, _, kind = name.rpartition(".")
        if layer + self._parts[0] not in self._stored:
            return name
        if f".{kind}" == self._parts[0]:
            return f"{layer}.weight"
        if f".{kind}" in self._parts:
            return None
        # GPTQ's tools write biases for layers that have none.
        return None if kind == "bias" and not np.any(super().tensor(name)) else name

    def tensor(self, name: str) -> Any:
        layer = name.removesuffix(".weight")
        if layer == name or layer + self._parts[0] not in self._stored:
            return super().tensor(name)
        return self._packed(layer).rows()

    def part(self, name: str, own: Quantised) -> LazyRows:
        """That part of the weight `name` with its own numbers, which are four bits each in groups of neighbours."""
        layer = name.removesuffix(".weight")
        if layer + self._parts[0] not in self._stored:
            raise InputError(
                f"tensor {name!r} is not packed, and by config.json all linear layers' are; they do not belong together"
            )
        return self._packed(layer).part(own)

    def _packed(self, layer: str) -> "_Packed":
        numbers, zeros, scales, group_of = (layer + part for part in self._parts[:4])
        return _Packed(
            layer,
            self._packing,
            super().tensor(numbers),
            super().tensor(zeros) if zeros in self._stored else None,
            super().tensor(scales),
            super().tensor(group_of) if group_of in self._stored else None,
        )


class _Packed:
    """One matrix, after a check of its tensors' shapes against each other."""

    def __init__(
        self,
        layer: str,
        packing: PackedIntegers,
        numbers: np.ndarray,
        zeros: np.ndarray | None,
        scales: np.ndarray,
        group_of: np.ndarray | None,
    ):
        self._layer, self._packing, self._per_word = layer, packing, _WORD_BITS // packing.bits
        self._by_row = packing.layout == "compressed-tensors"  # others have inputs before outputs
        self._numbers = _words(layer, numbers)
        self._zeros = None if zeros is None else _words(layer, zeros)
        self._scales = scales if self._by_row else scales.T
        outputs = len(self._scales)
        inputs = numbers.shape[1 if self._by_row else 0] * (1 if packing.layout == "awq" else self._per_word)
        size = inputs if packing.group_size is None else packing.group_size
        groups, words = math.ceil(inputs / size), math.ceil(outputs / self._per_word)
        wanted = {
            "numbers": {
                "gptq": (inputs // self._per_word, outputs),
                "awq": (inputs, words),
                "compressed-tensors": (outputs, inputs // self._per_word),
            }[packing.layout],
            "scales": (outputs, groups) if self._by_row else (groups, outputs),
            "zeros": (words, groups) if self._by_row else (groups, words),
            "groups": (inputs,),
        }
        given = {"numbers": numbers, "zeros": zeros, "scales": scales, "groups": group_of}
        for kind, tensor in given.items():
            if tensor is not None and tensor.shape != wanted[kind]:
                raise InputError(
                    f"the {kind} of {layer!r} have shape {list(tensor.shape)}, and by config.json and its other "
                    f"tensors it is {list(wanted[kind])}; they do not belong together"
                )
        in_order = np.arange(inputs) // size
        self._group_of = in_order if group_of is None else np.asarray(group_of)
        self._is_in_order = inputs % size == 0 and np.array_equal(self._group_of, in_order)
        if self._group_of.min() < 0 or self._group_of.max() >= groups:
            raise InputError(
                f"the groups of {layer!r} are from {self._group_of.min()} to {self._group_of.max()}, and it has "
                f"{groups}; they do not belong together"
            )
        self._shape = outputs, inputs

    def rows(self) -> LazyRows:
        """`[out, in]`, float32."""
        outputs, inputs = self._shape
        return LazyRows(self._unpack, [np.arange(outputs)[:, None]], range(inputs))

    def part(self, own: Quantised) -> LazyRows:
        """Of the matrix in `int4`: see `quantisation.made`."""
        if not self._is_in_order:
            raise InputError(
                f"the groups of {self._layer!r} are no neighbours, and by config.json they are; they do not belong "
                "together"
            )
        outputs, inputs = self._shape
        if own.part == "weight":
            return LazyRows(self._repack, [np.arange(outputs)[:, None]], range(inputs // 2), np.uint8)
        find, dtype = (self._scales_of, np.float32) if own.part == "scale" else (self._signed_zeros_of, np.int8)

        def make(parts: list[np.ndarray], columns: range) -> np.ndarray:
            indices = parts[0][..., 0]
            found = np.repeat(find(indices.reshape(-1)), own.repeats, axis=1).astype(dtype)
            return found[:, columns.start : columns.stop].reshape(*indices.shape, len(columns))

        return LazyRows(make, [np.arange(outputs)[:, None]], range(self._scales.shape[1] * own.repeats), dtype)

    def _repack(self, parts: list[np.ndarray], columns: range) -> np.ndarray:
        indices = parts[0][..., 0]
        numbers = self._numbers_of(indices.reshape(-1))[:, 2 * columns.start : 2 * columns.stop]
        return packed(numbers ^ 8, np).reshape(*indices.shape, len(columns))  # from 0 to 15 they become -8 to 7

    def _scales_of(self, rows: np.ndarray) -> np.ndarray:
        return self._scales[rows]

    def _signed_zeros_of(self, rows: np.ndarray) -> np.ndarray:
        return self._zeros_of(rows) - 8

    def _unpack(self, parts: list[np.ndarray], columns: range) -> np.ndarray:
        indices = parts[0][..., 0]
        rows = indices.reshape(-1)
        numbers = self._numbers_of(rows).astype(np.float32)
        zeros, scales = self._zeros_of(rows), self._scales[rows].astype(np.float32)
        if self._is_in_order:
            groups = numbers.reshape(*scales.shape, -1)
            groups -= zeros[..., None]
            groups *= scales[..., None]
        else:
            numbers -= zeros[:, self._group_of]
            numbers *= scales[:, self._group_of]
        return numbers[:, columns.start : columns.stop].reshape(*indices.shape, len(columns))

    def _numbers_of(self, rows: np.ndarray) -> np.ndarray:
        """uint8 `[rows, in]`."""
        if self._packing.layout == "awq":
            return self._outputs(self._numbers, rows).T
        return self._in_bytes(self._numbers[rows] if self._by_row else self._numbers[:, rows].T)

    def _zeros_of(self, rows: np.ndarray) -> np.ndarray:
        """float32 `[rows, groups]`."""
        if self._zeros is None:
            middle = np.float32(1 << self._packing.bits - 1)
            return np.full((len(rows), self._scales.shape[1]), middle)
        zeros = self._outputs(self._zeros.T if self._by_row else self._zeros, rows).T
        return zeros.astype(np.float32) + self._packing.zero_offset

    def _outputs(self, words: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of words `[any, out / numbers in a word]` the numbers of some neighbouring outputs, uint8 `[any, rows]`."""
        first, last = rows.min() // self._per_word, rows.max() // self._per_word + 1
        numbers = self._in_bytes(words[:, first:last])
        if self._packing.layout == "awq":
            numbers = numbers.reshape(len(words), -1, self._per_word)[..., _AWQ_PLACES].reshape(len(words), -1)
        return numbers[:, rows - first * self._per_word]

    def _in_bytes(self, words: np.ndarray) -> np.ndarray:
        """Words `[any, any]` as their numbers, the lowest first, a byte each."""
        found = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
        if self._packing.bits == 8:
            return found
        return np.stack([found & 15, found >> 4], axis=-1).reshape(len(words), -1)


def _words(layer: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.dtype not in (np.int32, np.uint32):
        raise InputError(
            f"the packed numbers of {layer!r} are {tensor.dtype.name}, and int32 is what holds them; download it again"
        )
    return tensor.view(np.uint32)
