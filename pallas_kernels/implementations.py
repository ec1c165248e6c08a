"""The implementations of a kernel, and which of them a device and a shape get."""

import functools
import logging
from typing import NamedTuple

import jax

AUTO = "auto"  # the quickest that the device has and the shape allows
MOSAIC_GPU = "mosaic_gpu"  # Pallas' Mosaic GPU, for Hopper
XLA = "xla"  # plain XLA, for any device
IMPLEMENTATIONS = (AUTO, MOSAIC_GPU, XLA)

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An implementation other than `AUTO`, and why it is that one."""

    implementation: str
    reason: str
    refused: bool = False  # the device has a kernel and the shape does not suit it


def choose(wanted: str, refusal: str | None, device: jax.Device | None = None) -> Choice:
    """What `wanted`, one of `IMPLEMENTATIONS`, comes to on `device`, JAX's first if it is left out.

    `refusal` says why the Mosaic kernel does not take the shape at hand, None that it does. A `ValueError` says what is
    wrong where it is asked for by name; `AUTO` takes XLA then.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"the implementation is {wanted!r}; give one of {', '.join(IMPLEMENTATIONS)}")
    if wanted == MOSAIC_GPU and refusal is not None:
        raise ValueError(refusal)
    if wanted != AUTO:
        return Choice(wanted, "asked for")
    device = device or jax.devices()[0]
    if not is_hopper(device):
        return Choice(XLA, f"there is no kernel for {device.device_kind}")
    if refusal is not None:
        return Choice(XLA, refusal, refused=True)
    return Choice(MOSAIC_GPU, f"{device.device_kind} is a Hopper GPU")


def is_hopper(device: jax.Device) -> bool:
    """Whether Mosaic GPU's kernels here are compiled for it: compute capability 9."""
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


@functools.cache
def log_once(message: str) -> None:
    """A warning, the first time that it is given."""
    _log.warning(message)
