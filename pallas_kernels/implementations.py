"""The implementations of a kernel, and which of them a device and a shape get."""

import functools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax

from pallas_kernels.native import library

AUTO = "auto"  # the quickest that the device has and the shape allows
MOSAIC_GPU = "mosaic_gpu"  # Pallas' Mosaic GPU, for Hopper
NATIVE = "native"  # C++, for CPUs with AVX2, AVX512-BF16 or AMX-BF16
XLA = "xla"  # plain XLA, for any device
IMPLEMENTATIONS = (AUTO, MOSAIC_GPU, NATIVE, XLA)

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An implementation other than `AUTO`, and why it is that one."""

    implementation: str
    reason: str
    refused: bool = False  # the device has a kernel and the shape does not suit it


def choose(wanted: str, refusals: Mapping[str, str | None], device: jax.Device | None = None) -> Choice:
    """What `wanted`, one of `IMPLEMENTATIONS`, comes to on `device`, JAX's first if it is left out.

    `refusals` says why a kernel does not take the shape at hand, None that it does. A `ValueError` says what is wrong
    where it is asked for by name; `AUTO` takes XLA then.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"the implementation is {wanted!r}; give one of {', '.join(IMPLEMENTATIONS)}")
    refusal = refusals.get(wanted) or (library.refusal() if wanted == NATIVE else None)
    if refusal is not None:
        raise ValueError(refusal)
    if wanted != AUTO:
        return Choice(wanted, "asked for")
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        kernel, reason = NATIVE, f"the CPU has {library.instructions()}"
        if unavailable := library.refusal():
            return Choice(XLA, unavailable)
    elif is_hopper(device):
        kernel, reason = MOSAIC_GPU, f"{device.device_kind} is a Hopper GPU"
    else:
        return Choice(XLA, f"there is no kernel for {device.device_kind}")
    refusal = refusals.get(kernel)
    return Choice(kernel, reason) if refusal is None else Choice(XLA, refusal, refused=True)


def is_hopper(device: jax.Device) -> bool:
    """Whether Mosaic GPU's kernels here are compiled for it: compute capability 9."""
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


@functools.cache
def log_once(message: str) -> None:
    """A warning, the first time that it is given."""
    _log.warning(message)
