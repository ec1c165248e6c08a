"""What this machine gives at most: every share in the other tables is a share of these."""

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.cli import machine
from jaxserve.runner.memory import reserve_gpu_memory
from scripts.gpu.case import Case, Clock, Row, Table
from scripts.gpu.timing import on_gpu, queued_seconds

TABLE = Table(
    "ceilings",
    "Ceilings",
    {"time": "ms", "GB/s": "", "TFLOP/s": ""},
    "The highest of each kind is what shares are taken of. A copy counts bytes read and bytes written.",
)
_SMI = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")


def facts() -> dict[str, Any]:
    """The machine as JAX and nvidia-smi see it. Starts JAX, with the whole GPU for it."""
    reserve_gpu_memory(0.9)
    device = jax.devices()[0]
    found = {
        "platform": device.platform,
        "device": device.device_kind,
        "platform_version": " ".join(device.client.platform_version.split()),  # CUDA's, on a GPU
        "versions": machine.versions(),
        "host": machine.host(),
        "bytes_reserved_by_jax": reserved_bytes(),
    }
    return found | ({"nvidia_smi": _nvidia_smi()} if on_gpu() else {})


def reserved_bytes() -> int | None:
    """What JAX has taken of the GPU's memory; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit") if on_gpu() else None


def _nvidia_smi() -> dict[str, str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(_SMI, (value.strip() for value in answer.split(",")), strict=False))


def cases(clock: Clock, ceilings: dict[str, float], folder: Path) -> Iterator[Case]:
    del clock, ceilings, folder
    size = 4 * 2**30 if on_gpu() else 16 * 2**20
    for dtype in (jnp.float32, jnp.bfloat16):
        yield Case(TABLE, f"read, sums of {size // 2**20} MiB {jnp.dtype(dtype).name}", partial(_read, size, dtype))
    yield Case(TABLE, f"copy, {size // 2**20} MiB of float32", partial(_copy, size))
    side = 8192 if on_gpu() else 256
    for shape in ((side, side, side), (side, side // 2, 3 * side)):
        rows, inner, columns = shape
        yield Case(TABLE, f"product, {rows} x {inner} x {columns} bfloat16", partial(_product, *shape))


def rates(known: dict[str, float]) -> dict[str, float]:
    """`known` with what it lacks of "read" (bytes a second) and "product" (operations a second) measured now."""
    found = dict(known)
    if "read" not in found:
        size = 2 * 2**30 if on_gpu() else 2**20
        found["read"] = max(_read(size, dtype)["GB/s"] for dtype in (jnp.float32, jnp.bfloat16)) * 1e9
    if "product" not in found:
        found["product"] = _product(*(3 * [8192 if on_gpu() else 256]))["TFLOP/s"] * 1e12
    return found


def random_values(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 of variance 1, from each place's own index: XLA makes them without a second array."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    mixed = (index + jnp.uint32(seed * 0x9E3779B1 & 0xFFFFFFFF)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return ((mixed ^ (mixed >> 13)).astype(jnp.float32) * 2.0**-32 - 0.5) * 12**0.5


def random_array(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Never measure on zeros: a GPU is faster on them than it is."""
    return jax.jit(lambda: (random_values(seed, shape) * scale).astype(dtype))()


def _read(size: int, dtype: Any) -> Row:
    matrix = random_array(1, (size // jnp.dtype(dtype).itemsize // 4096, 4096), dtype=dtype)
    total = jax.jit(lambda matrix: matrix.sum(axis=1, dtype=jnp.float32))
    seconds = queued_seconds(lambda: total(matrix))
    return {"time": seconds * 1e3, "GB/s": matrix.nbytes / seconds / 1e9}


def _copy(size: int) -> Row:
    matrix = random_array(1, (size // 4 // 4096, 4096), dtype=jnp.float32)
    negate = jax.jit(lambda matrix: -matrix)
    seconds = queued_seconds(lambda: negate(matrix))
    return {"time": seconds * 1e3, "GB/s": 2 * matrix.nbytes / seconds / 1e9}


def _product(rows: int, inner: int, columns: int) -> Row:
    """`[rows, inner]` times `[columns, inner]` transposed, as the engine has its weights."""
    x, weight = random_array(1, (rows, inner)), random_array(2, (columns, inner), inner**-0.5)
    product = jax.jit(lambda x, weight: jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ()))))
    seconds = queued_seconds(lambda: product(x, weight))
    moved = x.nbytes + weight.nbytes + 2 * rows * columns
    return {
        "time": seconds * 1e3,
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": 2 * rows * inner * columns / seconds / 1e12,
    }
