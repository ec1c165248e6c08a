"""What an engine tells of itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxserve import SamplingParams

TOTALS = ("total_prompt_tokens", "total_generated_tokens", "total_prefix_cache_queries", "total_prefix_cache_hits")


def grown(before: Any, after: Any, names: tuple[str, ...] = TOTALS) -> tuple[int, ...]:
    return tuple(getattr(after, name) - getattr(before, name) for name in names)


def test_tokens_are_counted_once_and_those_of_the_prefix_cache_apart(tiny_llm: Callable[..., Any]) -> None:
    llm = tiny_llm()
    prompt = {"prompt_token_ids": list(range(7, 7 + 40))}  # two full pages of 16, and 8 tokens
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    start = llm.engine.stats()
    llm.generate(prompt, params)
    once = llm.engine.stats()
    assert grown(start, once) == (40, 5, 40, 0)
    llm.generate(prompt, dataclasses.replace(params, n=2))
    assert grown(once, llm.engine.stats()) == (2 * 8, 2 * 5, 2 * 40, 2 * 32)


def test_a_completion_that_ends_early_counts_its_own_tokens_only(tiny_llm: Callable[..., Any]) -> None:
    llm = tiny_llm()
    prompt = {"prompt_token_ids": [9, 8, 7]}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    tokens = llm.generate(prompt, params)[0].outputs[0].token_ids
    stop = tokens[4]
    start = llm.engine.stats()
    (output,) = llm.generate(prompt, dataclasses.replace(params, stop_token_ids=[stop]))
    assert len(output.outputs[0].token_ids) == tokens.index(stop) + 1
    assert grown(start, llm.engine.stats(), ("total_generated_tokens",)) == (tokens.index(stop) + 1,)


def test_sequences_and_pages_are_where_they_are(tiny_llm: Callable[..., Any]) -> None:
    engine = (llm := tiny_llm()).engine
    compilations = engine.stats().total_compilations  # of the process: other tests' engines have compiled, too
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for number in range(6):  # four run at a time
        prompt = engine.inputs.check({"prompt_token_ids": [number + 1] * 20}, params)
        engine.add(prompt, params, request_id=str(number))
    assert (engine.stats().running, engine.stats().waiting) == (0, 6)
    for _ in range(6):
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.max_running) == (4, 2, 4)
    assert stats.pages_held >= 4 * 2
    assert stats.pages_held + stats.pages_cached + stats.pages_free == engine.pool.num_pages
    for number in range(6):
        engine.abort(str(number))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
    assert stats.pages_cached > 0
    assert stats.pages_cached + stats.pages_free == engine.pool.num_pages
    llm.generate({"prompt_token_ids": [1]}, params)  # what was under way is dropped
    assert engine.stats().total_compilations == compilations


def test_preemptions_and_what_they_cost_are_counted(tiny_llm: Callable[..., Any]) -> None:
    llm = tiny_llm(num_pages=9)  # of 16 tokens: one sequence fits, four do not
    start = llm.engine.stats()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [number + 1] * 20} for number in range(4)], params)
    stats = llm.engine.stats()
    assert stats.total_preemptions > start.total_preemptions
    cached = stats.total_prefix_cache_hits - start.total_prefix_cache_hits
    assert stats.total_prompt_tokens - start.total_prompt_tokens + cached > 4 * 20  # some were computed again
    assert stats.total_generated_tokens - start.total_generated_tokens == 4 * 60
