"""What is being traced for."""

import jax


def platform_of(array: jax.Array) -> str | None:
    """Of the one device where `array` lies, or will lie when what is being traced runs; None if there are several.

    Of several, each may have an array of its own (`jax.shard_map`). XLA's partitioner could not split a kernel.
    """
    mesh = jax.typeof(array).sharding.mesh
    device = mesh.abstract_device
    of_one = mesh.size == 1 or mesh.are_all_axes_manual
    return device.platform if of_one and device is not None else None
