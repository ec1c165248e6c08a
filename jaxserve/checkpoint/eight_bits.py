"""Linear layers' weights in eight bits: as a checkpoint holds them, or made of its own while those are read."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.checkpoint.lazy_rows import LazyRows
from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.layers.linear import EightBits, eight_bits
from jaxserve.layers.quantisation import KINDS, rounded, scales


class Scales:
    """The scales of a matrix' rows, in the ways that a numpy array is sliced and read."""

    dtype = np.dtype(np.float32)

    def __init__(self, rows: Any, kind: str):
        self._rows, self._kind = rows, kind  # [..., in]
        self.shape = rows.shape[:-1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "Scales":
        return Scales(self._rows[index], self._kind)

    def reshape(self, *shape: int) -> "Scales":
        return Scales(self._rows.reshape(*shape, self._rows.shape[-1]), self._kind)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return scales(np.asarray(self._rows), self._kind, np)


def _round(kind: str, parts: list[np.ndarray], columns: range) -> np.ndarray:
    whole = parts[0].astype(np.float32)  # all of its columns, which a row's scale depends on
    with np.errstate(invalid="ignore"):  # NaN, of which the scale tells
        return rounded(whole[..., columns.start : columns.stop], scales(whole, kind, np), kind, np)


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
    if part.is_scale:
        return Scales(weight, part.kind), []
    return LazyRows(partial(_round, part.kind), [weight], range(weight.shape[-1]), KINDS[part.kind].dtype), [name]


@partial(jax.jit, static_argnums=1)
def made_of(weight: jax.Array, part: EightBits) -> jax.Array:
    """The weight `[out, in]` in eight bits, or its scales `[out]`."""
    scale = scales(weight, part.kind)
    return scale if part.is_scale else rounded(weight, scale, part.kind)
