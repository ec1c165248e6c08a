"""Kernels in Mosaic GPU's interpreter: on the CPU, with races between a block's warpgroups told."""

import contextlib
from collections.abc import Iterator

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Kernels called within are interpreted, with memory that nobody has written full of NaN. Fails on a race."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")):
        yield
    printed = capsys.readouterr().out
    assert "RACE" not in printed, printed
