"""Linear layers' weights in few bits: as a checkpoint holds them, or made of its own while those are read."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.checkpoint.lazy_rows import LazyRows
from jaxserve.checkpoint.packed_integers import PackedDirectory
from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError
from jaxserve.layers.linear import quantised
from jaxserve.layers.quantisation import EIGHT_BITS, INT4, Quantised, made


def _made(own: Quantised, parts: list[np.ndarray], columns: range | None) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN, of which the scale tells
        whole = made(parts[0], own, np)  # all of its columns, which a row's scale depends on
    return whole if columns is None else whole[..., columns.start : columns.stop]


def tensor(files: SafetensorsDirectory, name: str, own: Quantised | None, *, kept: bool) -> tuple[Any, list[str]]:
    """What the checkpoint has for a parameter, which is that part of a quantised weight, and the tensors' names.

    Weights in eight bits lie in it with `weight_scale` beside each `weight`, one for every row or for all, as
    compressed-tensors writes them; those in four bits that are `kept` lie as `PackedDirectory` says. Of others they
    are made.
    """
    if own is None:
        return files.tensor(name), [name]
    weight_name = name.removesuffix("_zero").removesuffix("_scale")
    used = [name] if own.part == "weight" else []
    if kept and isinstance(files, PackedDirectory):
        return files.part(weight_name, own), used
    weight, scale_name = files.tensor(weight_name), f"{weight_name}_scale"
    if own.kind == INT4:
        columns = {"weight": weight.shape[-1] // 2}.get(own.part, weight.shape[-1] // own.group * own.repeats)
        return LazyRows(partial(_made, own), [weight], range(columns), _DTYPES[own.part]), used
    if weight.dtype == EIGHT_BITS[own.kind].dtype:
        if own.part == "weight":
            return weight, used
        scale = files.tensor(scale_name).reshape(-1)
        return (np.broadcast_to(scale, (len(weight),)) if len(scale) == 1 else scale), [scale_name]
    if weight.dtype.itemsize < 2 or scale_name in files.names():
        raise InputError(
            f"tensor {weight_name!r} is {weight.dtype.name} and by config.json {EIGHT_BITS[own.kind].dtype.name}; "
            "they do not belong together"
        )
    if own.part == "scale":
        return LazyRows(partial(_made, own), [weight], None), used
    return LazyRows(partial(_made, own), [weight], range(weight.shape[-1]), EIGHT_BITS[own.kind].dtype), used


_DTYPES = {"weight": np.uint8, "scale": np.float32, "zero": np.int8}  # in four bits


def made_from(path: tuple[Any, ...], parameter: nnx.Variable) -> tuple[Any, ...]:
    """Where the weight is in an unquantised model that the parameter at `path` is, or is made of."""
    return path if quantised(parameter) is None else (*path[:-1], "weight")


@partial(jax.jit, static_argnums=1)
def made_of(weight: jax.Array, own: Quantised) -> jax.Array:
    """That part of the weight `[out, in]`."""
    return made(weight, own)
