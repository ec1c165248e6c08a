"""The models and the engine give `transformers`' logits and greedy tokens on the same weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint.huggingface import read_config
from jaxserve.models.registry import model_config
from jaxserve.runner.cache_layout import CacheLayout
from pallas_kernels.native.paged_attention import DIM_MULTIPLE
from tests.models import dense
from tests.models.cases import CASES, MAX_MODEL_LEN, PROMPT_LENGTHS, prompts, write_checkpoint
from tests.models.references import NEW_TOKENS, Reference, live_reference, stored_reference, stored_seed

# Transformers takes a new base at every length, and we that of the longest sequence served: equal at one length.
EQUAL_AT = {"llama-dynamic-rope": PROMPT_LENGTHS[-1]}

# Of each architecture the first case that four devices can share.
ENGINE_CASES = {
    config["architectures"][0]: case
    for case, config in reversed(CASES.items())
    if config["num_attention_heads"] % 4 == 0
}.values()
# All on four devices; on one, where the CPU's own kernels run, those whose head size they take.
ENGINES = [(case, 4) for case in ENGINE_CASES]
ENGINES += [(case, 1) for case in ENGINE_CASES if CASES[case].get("head_dim", 1) % DIM_MULTIPLE == 0]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(case, tmp_path_factory.mktemp(case), seed=stored_seed(case))


@pytest.fixture(scope="module", params=["stored", "live"])
def reference(request: pytest.FixtureRequest, case: str, directory: Path) -> Reference:
    if request.param == "stored":
        return stored_reference(case)
    pytest.importorskip("torch", reason="the live comparison needs PyTorch")
    return live_reference(case, directory)[0]


def test_logits_and_greedy_tokens_equal_transformers(case: str, directory: Path, reference: Reference) -> None:
    """Each position of a completion is computed from transformers' own tokens before it."""
    given = prompts(case)
    rows = [prompt + completion for prompt, completion in zip(given, reference.greedy.tolist(), strict=True)]
    logits = dense.batch_logits(dense.load(directory, served=EQUAL_AT.get(case, MAX_MODEL_LEN)), rows)
    assert dense.relative_error(logits[-1][reference.positions], reference.logits) < 1e-4
    if case in EQUAL_AT:
        return
    found = [row[len(prompt) - 1 : -1].argmax(axis=-1) for row, prompt in zip(logits, given, strict=True)]
    np.testing.assert_array_equal(found, reference.greedy)


def layout_of(directory: Path) -> CacheLayout:
    """Of the engines below: pages of 8, and steps of 32 tokens at most."""
    windows = [kind.window for kind in model_config(read_config(directory)).layer_kinds]
    return CacheLayout.of(windows, page_size=8, max_step_tokens=32, max_model_len=MAX_MODEL_LEN)


@pytest.mark.parametrize(("case", "devices"), ENGINES)
def test_the_engine_generates_transformers_greedy_tokens(case: str, devices: int, tmp_path: Path) -> None:
    write_checkpoint(case, tmp_path, seed=stored_seed(case))
    settings = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "skip_tokenizer_init": True}
    layout = layout_of(tmp_path)
    num_pages = layout.pages_of(MAX_MODEL_LEN) + 3 * len(layout.windows)  # far fewer than all requests want
    tight = {"page_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 24, "num_pages": num_pages}
    where = {"tensor_parallel_size": devices, "compilation_cache_dir": "", "progress": False}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    with LLM(str(tmp_path), **settings, **tight, **where) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts(case)], params)
        assert llm.engine.scheduler.num_preemptions > 0 or any(layout.windows)
        assert llm.engine.pool.num_available == num_pages
        longest = {"prompt_token_ids": prompts(case)[-1]}
        again, cached = (llm.generate(longest, params)[0] for _ in range(2))
        assert cached.metrics.num_cached_tokens >= 32
    greedy = stored_reference(case).greedy
    for output in (again, cached):
        np.testing.assert_array_equal(output.outputs[0].token_ids, greedy[-1])
    np.testing.assert_array_equal([output.outputs[0].token_ids for output in outputs], greedy)


@pytest.mark.parametrize("case", ENGINE_CASES)
def test_many_files_load_as_one_does(case: str, tmp_path: Path) -> None:
    _, expected = dense.load(write_checkpoint(case, tmp_path / "one"))
    _, found = dense.load(write_checkpoint(case, tmp_path / "many", shards=3))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
