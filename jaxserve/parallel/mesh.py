"""The device mesh, and where each parameter lies on it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import InputError

TENSOR = "tensor"  # the axis over which heads, MLP columns and the vocabulary are split


def make_mesh(tensor_parallel_size: int) -> Mesh:
    """A mesh over the first `tensor_parallel_size` devices."""
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        raise InputError(
            f"tensor_parallel_size={tensor_parallel_size} needs as many devices and JAX sees {len(devices)} "
            f"({devices[0].platform}); lower it, or on a CPU simulate devices with jax_num_cpu_devices"
        )
    return Mesh(np.asarray(devices[:tensor_parallel_size]), (TENSOR,))


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def shardings_by_partition(mesh: Mesh) -> Callable[[PartitionSpec], NamedSharding]:
    """A function from a parameter's `partition` to its sharding: one object each, with which JAX is quicker."""
    return functools.cache(lambda partition: NamedSharding(mesh, partition))


def parameter_shardings(mesh: Mesh, state: nnx.State) -> Any:
    """For every parameter of `state`, the sharding that its `partition` rule gives on `mesh`; a tree like `state`'s."""
    of = shardings_by_partition(mesh)
    return nnx.map_state(lambda _, variable: of(variable.get_metadata()["partition"]), state)


def placed_shapes(mesh: Mesh, state: nnx.State) -> nnx.State:
    """The shapes and dtypes of `state`'s parameters, each with its sharding on `mesh`; a tree like `state`."""
    leaves, tree = jax.tree.flatten(state)
    where = jax.tree.leaves(parameter_shardings(mesh, state))
    placed = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=w) for leaf, w in zip(leaves, where, strict=True)]
    return jax.tree.unflatten(tree, placed)
