"""What a decode step reads from memory, over its time, against what this memory gives."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.cli.bench.measurement import Step
from jaxserve.parallel.mesh import TENSOR, make_mesh

PROBE = "the faster of a sum and a matrix-vector product over {mib} MiB of float32, best of {repeats}"
MIB_ON_CPU, MIB_ON_GPU = 512, 2048  # for each device, and all of a CPU's share one; many times any cache
_REPEATS = 7
_COLUMNS = 4096


def measure_bandwidth(devices: int) -> dict[str, Any]:
    """Bytes a second that a program reads from the memory of the first `devices` devices, all of them together.

    Run it while no engine holds the memory.
    """
    mesh = make_mesh(devices)
    mib = MIB_ON_CPU if mesh.devices.flat[0].platform == "cpu" else MIB_ON_GPU * devices
    rows = mib * 2**20 // (4 * _COLUMNS) // devices * devices
    where = NamedSharding(mesh, PartitionSpec(TENSOR, None))
    matrix = jax.jit(partial(jnp.ones, (rows, _COLUMNS), jnp.float32), out_shardings=where)()
    vector = jnp.ones(_COLUMNS, jnp.float32)
    # Each device works on its own rows, and its part of the result stays with it.
    programs = (jax.jit(lambda matrix, _: matrix.sum(axis=1)), jax.jit(jnp.dot))
    seconds = min(_best_seconds(program, matrix, vector) for program in programs)
    read = matrix.nbytes
    matrix.delete()
    return {"bytes_per_second": read / seconds, "probe": PROBE.format(mib=mib, repeats=_REPEATS)}


def _best_seconds(program: Any, *arrays: jax.Array) -> float:
    jax.block_until_ready(program(*arrays))  # compiles
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        taken.append(time.perf_counter() - start)
    return min(taken)


def decode_bandwidth(
    steps: Sequence[Step], *, weight_bytes: int, kv_bytes_per_token: int, memory_bytes_per_second: float
) -> dict[str, float] | None:
    """Means over the decode steps among `steps`; None if there are none.

    Each pass of the model reads all weights once, and the keys and values of every position that its rows attend to.
    No implementation reads less, unless sequences share pages, which count for each of them here. Padding, logits and
    activations are not counted.
    """
    decode = [step for step in steps if step.decode]
    if not decode:
        return None
    seconds = sum(step.seconds for step in decode)
    kv_bytes = kv_bytes_per_token * sum(step.positions_read for step in decode)
    passes = sum(step.repeats for step in decode)
    achieved = (passes * weight_bytes + kv_bytes) / seconds
    return {
        "weight_bytes_per_step": weight_bytes,
        "kv_bytes_per_step": kv_bytes / passes,
        "bytes_per_step": weight_bytes + kv_bytes / passes,
        "step_seconds": seconds / passes,
        "bytes_per_second": achieved,
        "share_of_memory_bandwidth": achieved / memory_bytes_per_second,
    }
