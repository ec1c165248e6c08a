"""Long contexts: what a program takes beside weights and pages does not grow with the longest prompt."""

import json
from collections.abc import Callable
from pathlib import Path

from jaxserve import LLM
from tests.conftest import SMALL
from tests.models.cases import write_checkpoint

CASE, LONG = "qwen3-tied-group-8-head-64", 32_768


def test_a_longer_context_takes_no_more_working_memory(tmp_path: Path, tiny_llm: Callable[..., LLM]) -> None:
    config = write_checkpoint(CASE, tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": LONG}))
    settings = SMALL | {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": LONG}
    with LLM(str(tmp_path), progress=False, **settings) as llm:
        table_rows = 4 * llm.engine.runner.state.slots.page_tables.nbytes
        found = llm.engine.runner.temporary_bytes
    keys_and_values = 2 * 2 * 2 * 64 * 4 * LONG  # of one sequence so long, which a program must not copy
    short = tiny_llm().engine.runner.temporary_bytes
    assert found is not None
    assert short is not None
    assert found <= short + table_rows
    assert table_rows < keys_and_values / 100
