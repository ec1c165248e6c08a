"""A running engine compiles nothing and keeps nothing."""

import gc
import random

import jax
import pytest

from jaxserve import SamplingParams
from jaxserve.runner.compilation import compilations


def random_request(rng: random.Random, longest_prompt: int = 100, longest: int = 25) -> tuple[dict, SamplingParams]:
    """Any prompt and any mix of settings that an engine takes."""
    prompt = {"prompt_token_ids": [rng.randrange(517) for _ in range(rng.randint(1, longest_prompt))]}
    settings = {
        "n": (1, 2),
        "temperature": (0.0, 0.7, 1.5),
        "top_k": (0, 5),
        "top_p": (1.0, 0.8),
        "min_p": (0.0, 0.1),
        "repetition_penalty": (1.0, 1.3),
        "presence_penalty": (0.0, 0.5),
        "logit_bias": (None, {7: 2.0}),
        "logprobs": (None, 0, 3),
        "prompt_logprobs": (None, 2),
        "min_tokens": (0, 3),
        "stop_token_ids": (None, [3, 4]),
        "seed": (None, 9),
    }
    chosen = {name: rng.choice(values) for name, values in settings.items()}
    return prompt, SamplingParams(max_tokens=rng.randint(3, longest), ignore_eos=True, **chosen)


def test_nothing_compiles_after_warm_up_over_a_random_workload(tiny_llm):
    llm = tiny_llm(num_pages=20)
    rng = random.Random(1)
    before = compilations.count
    requests = [random_request(rng) for _ in range(60)]
    llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    assert compilations.count == before
    assert llm.engine.pool.num_available == 20


def test_the_counter_counts():
    before = compilations.count
    jax.jit(lambda x: x * 3 + 1)(random.random())
    assert compilations.count == before + 1


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.timeout(900)
def test_memory_does_not_grow_over_2000_requests(tiny_llm):
    llm = tiny_llm()
    rng = random.Random(2)

    def run(count: int) -> None:
        for _ in range(count // 100):
            requests = [random_request(rng, longest_prompt=40, longest=8) for _ in range(100)]
            llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
        gc.collect()

    run(500)
    arrays, objects, memory = len(jax.live_arrays()), len(gc.get_objects()), resident_bytes()
    run(2000)
    assert len(jax.live_arrays()) == arrays
    assert len(gc.get_objects()) - objects < 2000
    assert resident_bytes() - memory < 32 * 2**20
