"""Every test sees eight simulated devices, and shares engines: each costs seconds to compile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.models.cases import write_checkpoint

jax.config.update("jax_num_cpu_devices", 8)

# One decode bucket and one prefill bucket: three programs to compile.
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "page_size": 16}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of 16 heads over 2 KV heads, which one to eight devices can share."""
    return write_checkpoint("qwen3-tied-group-8-head-64", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_llm(tiny_checkpoint: Path) -> Callable[..., Any]:
    """A function from settings to an `LLM` of the tiny checkpoint in float32; equal settings share one."""
    from jaxserve import LLM

    made: dict[tuple, LLM] = {}

    def make(**settings: Any) -> LLM:
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = LLM(str(tiny_checkpoint), dtype="float32", skip_tokenizer_init=True, **(SMALL | settings))
        return made[key]

    return make
