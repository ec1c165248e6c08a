"""The engine on a simulated device: what scheduling does to requests' times, exactly."""

import sys

import numpy as np
import pytest

from jaxserve.cli.bench.host import decoding_engine, host_seconds
from jaxserve.engine.simulation import Arrival, serve_trace, simulated_engine
from jaxserve.runner.simulated import CostModel

COST = CostModel(per_pass=0.010, per_prefill_token=0.0005, per_decode_row=0.0001)
SETTINGS = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "max_model_len": 9000, "num_pages": 1000}


def prompt(length: int, first: int = 0) -> list[int]:
    return [first, *range(1, length)]


def serve(trace: list[Arrival], **settings):
    engine, runner = simulated_engine(COST, **(SETTINGS | {"max_decode_steps": 1} | settings))
    served = serve_trace(engine, runner, trace)
    assert [sum(request.counts) for request in served] == [arrival.max_tokens for arrival in trace]
    assert engine.pool.num_held == 0
    return served, engine, runner


def test_a_lone_request_takes_its_prefill_and_its_decode_steps():
    served, _, runner = serve([Arrival(1.0, prompt(200), 11)])
    assert served[0].ttft == pytest.approx(0.010 + 200 * 0.0005)
    assert served[0].gaps == pytest.approx([0.0101] * 10)
    assert runner.clock() == pytest.approx(1.0 + 0.110 + 10 * 0.0101)


def streams_beside_a_long_prompt(**settings) -> tuple[np.ndarray, float]:
    """Gaps of 16 streams while a prompt of 8,192 tokens is computed, and the gap without it."""
    trace = [Arrival(0.0, prompt(20, index), 400) for index in range(16)] + [Arrival(1.0, prompt(8192, 99), 1)]
    served, _, _ = serve(trace, **settings)
    arrived, done = 1.0, served[-1].times[0]
    times = np.array(served[0].times)
    during = np.diff(times)[(times[1:] > arrived) & (times[1:] < done)]
    return during, 0.010 + 16 * 0.0001


def test_without_a_bound_streams_wait_for_whole_prefill_steps():
    during, undisturbed = streams_beside_a_long_prompt()
    assert np.percentile(during, 95) > 10 * undisturbed


def test_with_a_bound_on_the_time_between_tokens_prefill_steps_are_cut_to_it():
    during, undisturbed = streams_beside_a_long_prompt(max_itl_ms=40.0)
    assert len(during) > 100
    assert np.percentile(during, 95) <= 0.040
    assert during.max() > undisturbed  # the prompt does get its share


def test_the_bound_costs_nothing_where_nobody_waits():
    alone, bounded = (serve([Arrival(0.0, prompt(4096), 1)], max_itl_ms=itl)[0][0].ttft for itl in (None, 20.0))
    assert bounded == pytest.approx(alone)


def test_several_tokens_a_step_take_no_longer_than_the_burst_and_come_one_by_one_while_others_wait():
    trace = [Arrival(0.0, prompt(20), 40), Arrival(0.2, prompt(20, 1), 2)]
    served, _, _ = serve(trace, max_decode_steps=8, decode_burst_ms=45.0)
    assert max(served[0].counts) == 4  # of 10.1 ms each
    assert served[1].ttft < 0.045 + 0.010 + 20 * 0.0005 + 0.0102 * 2


def test_half_of_the_wanted_pages_keep_most_of_the_throughput():
    lengths = np.random.default_rng(0).integers(150, 1200, 96).tolist()
    trace = [Arrival(0.0, prompt(300, index), length) for index, length in enumerate(lengths)]

    def tokens_a_second(num_pages: int) -> tuple[float, int]:
        _, engine, runner = serve(trace, num_pages=num_pages)
        return sum(lengths) / runner.clock(), engine.scheduler.num_preemptions

    wanted = 32 * 24  # of 1,500 tokens each
    ample, preempted = tokens_a_second(wanted)
    tight, preempted_tight = tokens_a_second(wanted // 2)
    assert preempted == 0 < preempted_tight
    assert tight > 0.8 * ample


@pytest.mark.parametrize(("stream", "calls"), [(False, 7), (True, 13)])
def test_the_host_makes_few_calls_for_each_sequence_of_a_decode_step(stream, calls):
    """Functions that are called, as a busy machine's clock says little; `jaxserve bench host` gives the time."""
    engine, steps, called = decoding_engine(256, 60, stream=stream), 20, 0

    def count(frame, event, argument):
        nonlocal called
        called += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(steps):
            engine.step()
    finally:
        sys.setprofile(None)
    assert 0 < called <= calls * 256 * steps


def test_the_hosts_time_for_a_step_is_told():
    assert 0 < host_seconds(16, 5, stream=True)["median"] < 1
