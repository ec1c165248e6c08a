"""What an engine tells of itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve import SamplingParams
from jaxserve.engine.engine import Engine
from jaxserve.engine.simulation import simulated_engine
from jaxserve.runner.simulated import CostModel
from jaxserve.stats import EngineStats, Histogram

TOTALS = ("total_prompt_tokens", "total_generated_tokens", "total_prefix_cache_queries", "total_prefix_cache_hits")

BEGUN = ("total_begun_prompt_tokens", "total_begun_cached_tokens")


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
    assert grown(start, once, BEGUN) == (40, 0)
    llm.generate(prompt, dataclasses.replace(params, n=2))
    assert grown(once, llm.engine.stats()) == (2 * 8, 2 * 5, 2 * 40, 2 * 32)
    assert grown(once, llm.engine.stats(), BEGUN) == (2 * 40, 2 * 32)


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
    begun = grown(start, stats, BEGUN)
    assert begun == (4 * 20, 0)  # each prompt once, however often it was computed


# What follows runs on a device whose steps take exactly as long as they are said to.
PREFILL, DECODE = 0.030, 0.008
SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "num_pages": 40, "page_size": 16}


def simulated(**settings: Any) -> Engine:
    cost = CostModel(per_pass=DECODE, per_prefill_token=(PREFILL - DECODE) / 20)
    engine, _ = simulated_engine(cost, **(SETTINGS | {"max_decode_steps": 1} | settings))
    return engine


def run(engine: Engine, prompts: dict[str, int], max_tokens: int, **params: Any) -> EngineStats:
    """Requests of so many prompt tokens, to their end."""
    wanted = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)
    for request_id, tokens in prompts.items():
        prompt = {"prompt_token_ids": [ord(request_id)] * tokens}
        engine.add(engine.inputs.check(prompt, wanted), wanted, request_id=request_id)
    while engine.has_unfinished:
        engine.step()
    return engine.stats()


def counted(histogram: Histogram) -> dict[float, int]:
    """By the bounds that values lay below."""
    return {
        bound: count for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True) if count
    }


def test_steps_are_counted_by_kind_with_their_seconds_and_tokens() -> None:
    stats = run(simulated(), {"a": 20}, 6)
    assert counted(stats.prefill_seconds) == {0.03: 1}
    # The last of six tokens is known to be the last; nothing runs beyond it.
    assert counted(stats.decode_seconds) == {0.01: 5}
    assert stats.prefill_seconds.sum == pytest.approx(PREFILL)
    assert stats.decode_seconds.sum == pytest.approx(5 * DECODE)
    assert counted(stats.step_tokens) == {32: 1, 1: 5}
    assert stats.step_tokens.sum == 20 + 5


def test_each_token_after_the_first_has_its_wait() -> None:
    stats = run(simulated(), {"a": 20, "b": 20}, 6)  # in one prefill step of 52 ms
    assert counted(stats.token_seconds) == {0.01: 2 * 5}
    assert stats.token_seconds.sum == pytest.approx(2 * 5 * DECODE)


def test_a_prompt_of_another_makes_tokens_wait() -> None:
    engine = simulated()
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    engine.add(engine.inputs.check({"prompt_token_ids": [1] * 20}, params), params, request_id="a")
    for _ in range(4):
        engine.step()
    stats = run(engine, {"b": 20}, 10)
    assert counted(stats.token_seconds) == {0.01: 17, 0.05: 1}
    assert stats.token_seconds.sum == pytest.approx(18 * DECODE + PREFILL)


def test_tokens_that_come_several_at_a_time_are_one_wait() -> None:
    stats = run(simulated(max_decode_steps=4, decode_burst_ms=40.0), {"a": 20}, 33)
    assert sum(stats.token_seconds.counts) == sum(stats.decode_seconds.counts) < 32
    assert stats.token_seconds.sum == pytest.approx(32 * DECODE)


def test_a_preempted_sequence_has_waited_while_it_had_no_place() -> None:
    engine = simulated(num_pages=9)  # of 16 tokens: four sequences of 80 do not fit
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for number in range(4):
        prompt = engine.inputs.check({"prompt_token_ids": [number + 1] * 20}, params)
        engine.add(prompt, params, request_id=str(number))
    seen: dict[str, list[float]] = {str(number): [] for number in range(4)}
    while engine.has_unfinished:
        for delta in engine.step():
            seen[delta.request_id].append(engine.stats().seconds)
    stats = engine.stats()
    assert stats.total_preemptions > 0
    waits = stats.token_seconds
    assert max(counted(waits)) > 0.1
    assert waits.sum == pytest.approx(sum(times[-1] - times[0] for times in seen.values()))
    # A token that was under way when its sequence was preempted is counted together with the next one.
    assert 0 <= sum(len(times) - 1 for times in seen.values()) - sum(waits.counts) <= stats.total_preemptions


def test_a_sequence_that_has_ended_waits_no_longer() -> None:
    engine = simulated()
    engine.runner._token_id = 5  # every token
    params = SamplingParams(temperature=0, max_tokens=50, stop_token_ids=[5])
    engine.add(engine.inputs.check({"prompt_token_ids": [1] * 20}, params), params, request_id="a")
    while engine.has_unfinished:
        engine.step()
    while engine._dispatched:  # the step that was under way when it ended
        engine.step()
    stats = engine.stats()
    assert sum(stats.decode_seconds.counts) == 1
    assert sum(stats.token_seconds.counts) == 0


def test_decode_bytes_are_weights_and_attended_positions(tiny_llm: Callable[..., Any]) -> None:
    llm = tiny_llm(max_decode_steps=4)
    before = llm.engine.stats()
    llm.generate({"prompt_token_ids": [3] * 10}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    runner, after = llm.engine.runner, llm.engine.stats()
    # Seven tokens come from decode steps; the first of them attends to the prompt and the token that came from it.
    read = 7 * runner.weight_bytes_per_step + sum(range(11, 18)) * runner.kv_bytes_per_token
    assert after.total_decode_bytes - before.total_decode_bytes == read


def test_a_look_does_not_change_with_what_comes_later() -> None:
    engine = simulated()
    looks = [run(engine, {"a": 20}, 4), run(engine, {"b": 20}, 4)]
    assert sum(looks[0].decode_seconds.counts) == 3
    assert sum(looks[1].decode_seconds.counts) == 6
    assert looks[0].total_host_seconds.schedule < looks[1].total_host_seconds.schedule
