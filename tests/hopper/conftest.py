"""These tests compile for a GPU that is not there: they need JAX's CUDA plugin, and a process of their own."""

import importlib.util
import os

import pytest

COMMAND = "bash scripts/test_hopper.sh"


def _reason() -> str | None:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return f"compiling for an absent H200 needs jax-cuda13-plugin; {COMMAND} makes an environment that has it"
    if "--xla_gpu_autotune_level=0" not in os.environ.get("XLA_FLAGS", ""):
        return f"compiling for an absent H200 wants a process of its own; {COMMAND} starts it"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := _reason()) is not None:
        for item in items:
            if "hopper" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))
