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


def _scales(kind: str, parts: list[np.ndarray], columns: None) -> np.ndarray:
    return scales(parts[0], kind, np)


def _rounded(kind: str, parts: list[np.ndarray], columns: range) -> np.ndarray:
    whole = parts[0].astype(np.float32)  # all of its columns, which a row's scale depends on
    with np.errstate(invalid="ignore"):  # NaN, of which the scale tells
        return rounded(whole[..., columns.start : columns.stop], scales(whole, kind, np), kind, np)


def tensor(files: SafetensorsDirectory, name: str, part: EightBits | None) -> tuple[Any, list[str]]:
    """What the checkpoint has for a parameter, which is that `part` of a weight in eight bits, and the tensors' names.

    Weights in eight bits lie in it with `weight_scale` beside each `weight`, one for every row or for all, as
    compressed-tensors writes them; of others they are made.
    """
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
        return LazyRows(partial(_scales, part.kind), [weight], None), []
    columns = range(weight.shape[-1])
    return LazyRows(partial(_rounded, part.kind), [weight], columns, KINDS[part.kind].dtype), [name]


def made_from(path: tuple[Any, ...], parameter: nnx.Variable) -> tuple[Any, ...]:
    """Where the weight is in an unquantised model that the parameter at `path` is, or is made of."""
    return path if eight_bits(parameter) is None else (*path[:-1], "weight")


@partial(jax.jit, static_argnums=1)
def made_of(weight: jax.Array, part: EightBits) -> jax.Array:
    """The weight `[out, in]` in eight bits, or its scales `[out]`."""
    scale = scales(weight, part.kind)
    return scale if part.is_scale else rounded(weight, scale, part.kind)
