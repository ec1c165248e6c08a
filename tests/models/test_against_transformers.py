"""The models and the engine give `transformers`' logits and greedy tokens on the same weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from tests.models import dense
from tests.models.cases import CASES, prompts, write_checkpoint
from tests.models.references import NEW_TOKENS, Reference, live_reference, stored_reference, stored_seed


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


@pytest.fixture(scope="module")
def model_logits(case: str, directory: Path) -> np.ndarray:
    return dense.logits(dense.load(directory), prompts(case)[-1])


@pytest.fixture(scope="module")
def generated(case: str, directory: Path) -> np.ndarray:
    settings = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, "compilation_cache_dir": ""}
    tight = {"page_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 32}  # the longest prompt takes two steps
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    with LLM(str(directory), progress=False, **settings, **tight) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts(case)], params)
    return np.array([output.outputs[0].token_ids for output in outputs])


def test_logits_are_within_1e_4_of_transformers(model_logits: np.ndarray, reference: Reference) -> None:
    assert dense.relative_error(model_logits[reference.positions], reference.logits) < 1e-4


def test_greedy_tokens_of_the_engine_equal_transformers(generated: np.ndarray, reference: Reference) -> None:
    np.testing.assert_array_equal(generated, reference.greedy)


def test_many_files_load_as_one_does(case: str, directory: Path, tmp_path: Path) -> None:
    _, expected = dense.load(directory)
    _, found = dense.load(write_checkpoint(case, tmp_path, seed=stored_seed(case), shards=3))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
