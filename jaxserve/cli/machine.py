"""What this machine is: for `jaxserve env`, and beside every benchmark's numbers."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jaxserve

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "starlette",
    "uvicorn",
)
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")  # shown where they are installed

# Those that decide how fast products and conversions of the number formats in use are.
CPU_FEATURES = frozenset(
    "avx2 f16c fma avx512f avx512_bf16 avx512_fp16 avx512_vnni amx_bf16 amx_int8 asimd asimddp bf16 i8mm sve".split()
)


def versions() -> dict[str, str | None]:
    """Of jaxserve, Python and the packages that matter; None for one that is missing."""
    found: dict[str, str | None] = {
        "jaxserve": jaxserve.__version__,
        "python": platform.python_version(),
    }
    for package in (*PACKAGES, *PLUGINS):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in PLUGINS:
                found[package] = None
    return found


def host() -> dict[str, Any]:
    """Operating system, CPU, its cores that this process may use, its features, and bytes of memory."""
    cpu = _cpu_info()
    features = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "system": platform.platform(),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": sorted(features & CPU_FEATURES),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def devices() -> list[dict[str, Any]]:
    """The devices that JAX sees; bytes of memory are what JAX may take, None where the device is the host."""
    import jax

    return [
        {
            "id": device.id,
            "platform": device.platform,
            "kind": device.device_kind,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None,
        }
        for device in jax.devices()
    ]


def _cpu_info() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
