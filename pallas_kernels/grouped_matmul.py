"""Grouped products: one weight for each group of rows, by the implementation that the device has."""

import jax

from pallas_kernels.implementations import AUTO, MOSAIC_GPU, XLA, Choice, choose, is_hopper, log_once
from pallas_kernels.xla import grouped_matmul as xla


def choose_grouped_matmul(implementation: str, x: jax.Array, weights: jax.Array) -> Choice:
    """What `grouped_matmul` runs for `implementation`, and why. `ValueError` for what it does not take."""
    if implementation not in (AUTO, MOSAIC_GPU, XLA):
        raise ValueError(f"{implementation!r} has no grouped products; give one of {AUTO}, {MOSAIC_GPU}, {XLA}")
    device = jax.devices()[0]
    if device.platform == "cpu" and implementation == AUTO:
        return Choice(XLA, "there is no kernel for CPUs")
    refusal = None
    if implementation == MOSAIC_GPU or is_hopper(device):
        from pallas_kernels.mosaic_gpu.grouped_matmul import refusal as refuse  # on demand: it brings Pallas

        refusal = refuse(x, weights)
    return choose(implementation, {MOSAIC_GPU: refusal}, device)


def grouped_matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, implementation: str = AUTO
) -> jax.Array:
    """`pallas_kernels.xla.grouped_matmul.grouped_matmul`, by one of `IMPLEMENTATIONS` other than native.

    `ValueError`, unless `implementation` is "auto", for operands that the one asked for does not take; "auto" runs
    those in XLA, and logs it once.
    """
    choice = choose_grouped_matmul(implementation, x, weights)
    if choice.refused:
        log_once(f"grouped products run in XLA: {choice.reason}")
    if choice.implementation == MOSAIC_GPU:
        from pallas_kernels.mosaic_gpu.grouped_matmul import grouped_matmul as run

        return run(x, weights, group_sizes)
    return xla.grouped_matmul(x, weights, group_sizes)
