"""A request's tokens depend on nothing but the request: float32, token for token."""

import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.runner.step_batch import PrefillArrays, StepBatch
from pallas_kernels.native import library

RNG = np.random.default_rng(0)
PROMPTS = [{"prompt_token_ids": RNG.integers(0, 517, length).tolist()} for length in (3, 60, 17, 33, 1, 90, 32)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=24, ignore_eos=True, frequency_penalty=0.3)


def tokens(llm, prompts=PROMPTS, params=None) -> list[list[int]]:
    """Each prompt's completions: greedy and seeded requests side by side."""
    params = params or [GREEDY if index % 2 else SEEDED for index in range(len(prompts))]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def expected(tiny_llm) -> list[list[int]]:
    """Each request on its own."""
    return [tokens(tiny_llm(), [prompt], [GREEDY if index % 2 else SEEDED])[0] for index, prompt in enumerate(PROMPTS)]


def test_completions_are_varied_enough_to_tell_requests_apart(expected):
    assert len({tuple(completion) for completion in expected}) == len(expected)
    assert all(len(set(completion)) > 3 for completion in expected)


def test_whatever_runs_beside_it(tiny_llm, expected):
    assert tokens(tiny_llm()) == expected


@pytest.mark.parametrize("chunk", [5, 16, 128])
def test_whatever_the_chunk_size(tiny_llm, expected, chunk):
    assert tokens(tiny_llm(max_num_batched_tokens=chunk)) == expected


@pytest.mark.parametrize(("backend", "mixed"), [("native", True), ("xla", False)])
def test_whether_prompts_share_steps_with_running_sequences_or_take_turns_with_them(tiny_llm, expected, backend, mixed):
    if mixed and not library.available():
        pytest.skip(f"the native kernels cannot be built here: {library.refusal()}")
    llm = tiny_llm(max_num_batched_tokens=64, max_num_seqs=8, attention_backend=backend)
    shared = []

    def on_step(batch: StepBatch) -> None:
        if isinstance(batch.arrays, PrefillArrays):
            shared.append(bool(batch.arrays.continues.any()))

    llm.engine.on_step = on_step
    try:
        assert tokens(llm) == expected
    finally:
        llm.engine.on_step = None
    assert any(shared) == mixed


def test_after_preemption_in_a_pool_that_is_nearly_full(tiny_llm, expected):
    llm = tiny_llm(num_pages=9)
    assert tokens(llm) == expected
    assert llm.engine.scheduler.num_preemptions > 0
    assert llm.engine.pool.num_available == 9


@pytest.mark.parametrize(
    "settings", [{"enable_prefix_caching": False}, {"max_decode_steps": 1}, {"max_decode_steps": 5}]
)
def test_with_prefix_cache_and_several_tokens_a_step_or_without(tiny_llm, expected, settings):
    assert tokens(tiny_llm(**settings)) == expected


def test_whether_its_prefix_is_computed_shared_or_cached(tiny_llm):
    llm = tiny_llm(page_size=8)
    prefix = RNG.integers(0, 517, 43).tolist()
    prompts = [{"prompt_token_ids": [*prefix, *RNG.integers(0, 517, length).tolist()]} for length in (9, 0, 30)]

    def run() -> tuple[list[list[int]], list[int]]:
        outputs = llm.generate(prompts, [SEEDED, GREEDY, SEEDED])
        return [output.outputs[0].token_ids for output in outputs], [o.metrics.num_cached_tokens for o in outputs]

    together, shared = run()
    assert shared == [0, 40, 40]
    again, cached = run()
    assert cached == [48, 40, 72]
    alone = tokens(tiny_llm(page_size=8, enable_prefix_caching=False), prompts, [SEEDED, GREEDY, SEEDED])
    assert together == again == alone


@pytest.mark.parametrize("page_size", [8, 64])
def test_whatever_the_page_size(tiny_llm, expected, page_size):
    assert tokens(tiny_llm(page_size=page_size)) == expected


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_on_any_number_of_devices(tiny_llm, expected, devices):
    llm = tiny_llm(tensor_parallel_size=devices)
    pages = llm.engine.runner.state.cache.k[0]
    assert len(pages.sharding.device_set) == devices
    assert pages.addressable_shards[0].data.shape[1] * devices == pages.shape[1]
    assert tokens(llm) == expected


def test_a_seeded_request_repeats_and_another_seed_differs(tiny_llm):
    def once(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=16, ignore_eos=True)
        return tokens(tiny_llm(), PROMPTS[:1], params)[0]

    assert once(3) == once(3) != once(4)


def test_completions_of_n_are_those_of_the_seeds_that_follow(tiny_llm):
    settings = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    together = tiny_llm().generate(PROMPTS[1], SamplingParams(n=3, seed=5, **settings))[0].outputs
    alone = [tokens(tiny_llm(), [PROMPTS[1]], SamplingParams(seed=5 + i, **settings))[0] for i in range(3)]
    assert [output.index for output in together] == [0, 1, 2]
    assert [output.token_ids for output in together] == alone
