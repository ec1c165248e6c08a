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


def make_mesh(tensor_parallel_size: int, *, of_all_processes: bool = False) -> Mesh:
    """A mesh over the first `tensor_parallel_size` devices, of this process alone or `of_all_processes`."""
    devices = jax.devices() if of_all_processes else jax.local_devices()
    if tensor_parallel_size > len(devices):
        raise InputError(
            f"tensor_parallel_size={tensor_parallel_size} needs as many devices and JAX sees {len(devices)} "
            f"({devices[0].platform}); lower it, or on a CPU simulate devices with jax_num_cpu_devices"
        )
    taken = devices[:tensor_parallel_size]
    without = {device.process_index for device in devices} - {device.process_index for device in taken}
    if without:
        raise InputError(
            f"tensor_parallel_size={tensor_parallel_size} leaves process {min(without)} without work, as the processes "
            f"before it have as many devices; raise it to at most {len(devices)}, or start fewer processes"
        )
    return Mesh(np.asarray(taken), (TENSOR,))


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
