"""Linear layers' weights in eight bits: as a checkpoint holds them, or made of its own while those are read."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.layers.linear import EightBits, eight_bits
from jaxserve.layers.quantisation import KINDS, rounded, scales


class Scales:
    """The scales of a matrix' rows, in the ways that a numpy array is sliced and read."""

    dtype = np.dtype(np.float32)

    def __init__(self, rows: np.ndarray, kind: str):
        self._rows, self._kind = rows, kind  # [..., in]
        self.shape = rows.shape[:-1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "Scales":
        return Scales(self._rows[index], self._kind)

    def reshape(self, *shape: int) -> "Scales":
        return Scales(self._rows.reshape(*shape, self._rows.shape[-1]), self._kind)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return scales(self._rows, self._kind, np)


class Rounded:
    """A matrix in eight bits, in the ways that a numpy array is sliced and read; nothing is made before that."""

    def __init__(self, rows: np.ndarray, kind: str, columns: slice = slice(None)):
        self._rows, self._kind, self._columns = rows, kind, columns  # [..., in], all of which a scale depends on
        self.dtype = KINDS[kind].dtype
        self.shape = (*rows.shape[:-1], len(range(rows.shape[-1])[columns]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "Rounded":
        *leading, columns = index if isinstance(index, tuple) else (index,)
        if len(leading) < self._rows.ndim - 1:
            return Rounded(self._rows[(*leading, columns)], self._kind, self._columns)
        chosen = range(self._rows.shape[-1])[self._columns][columns]
        return Rounded(self._rows[tuple(leading)], self._kind, slice(chosen.start, chosen.stop))

    def reshape(self, *shape: int) -> "Rounded":
        """All but the last size may be others."""
        return Rounded(self._rows.reshape(*shape[:-1], self._rows.shape[-1]), self._kind, self._columns)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.asarray(self._rows, np.float32)
        return rounded(whole[..., self._columns], scales(whole, self._kind, np), self._kind, np)


def tensor(files: SafetensorsDirectory, name: str, stored: nnx.Variable) -> tuple[Any, list[str]]:
    """What the checkpoint has for a parameter, and the names of the tensors used.

    Weights in eight bits lie in it with `weight_scale` beside each `weight`, one for every row or for all, as
    compressed-tensors writes them; of others they are made.
    """
    part = eight_bits(stored)
    if part is None:
        return files.tensor(name), [name]
    weight_name = name.removesuffix("_scale")
    weight, scale_name = files.tensor(weight_name), f"{weight_name}_scale"
    if weight.dtype == KINDS[part.kind].dtype:
        if not part.is_scale:
            return weight, [name]
        scale = files.tensor(scale_name).reshape(-1)
        return (np.broadcast_to(scale, (len(weight),)) if len(scale) == 1 else scale), [scale_name]
    if weight.dtype.itemsize < 2 or scale_name in files.names():
        raise InputError(
            f"tensor {weight_name!r} is {weight.dtype.name} and by config.json {KINDS[part.kind].dtype.name}; "
            "they do not belong together"
        )
    return (Scales(weight, part.kind), []) if part.is_scale else (Rounded(weight, part.kind), [name])


@partial(jax.jit, static_argnums=1)
def made_of(weight: jax.Array, part: EightBits) -> jax.Array:
    """The weight `[out, in]` in eight bits, or its scales `[out]`."""
    scale = scales(weight, part.kind)
    return scale if part.is_scale else rounded(weight, scale, part.kind)
