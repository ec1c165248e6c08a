"""Scheduler and page pool through random histories, with a stand-in for the device that answers a step late."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.page_pool import PagePool
from jaxserve.engine.request import Request, State
from jaxserve.engine.scheduler import Decode, Prefill, Scheduler
from jaxserve.sampling_params import SamplingParams

PAGE = 4
STOP_TOKEN = 1


def make_request(name: str, prompt: int, max_tokens: int, arrival: int, priority: int = 0) -> Request:
    return Request(
        name,
        list(range(10, 10 + prompt)),
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        arrival=arrival,
        priority=priority,
        stop_token_ids=frozenset([STOP_TOKEN]),
    )


class Simulation:
    """An engine without a device: checks every step's promises, and hands out the tokens of `answers`."""

    def __init__(self, *, num_pages: int, max_num_seqs: int, budget: int, ahead: bool):
        self.pool = PagePool(num_pages)
        self.budget, self.max_num_seqs, self.ahead = budget, max_num_seqs, ahead
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_prefill_seqs=2, page_size=PAGE
        )
        self.requests: list[Request] = []
        self.ended: dict[str, str] = {}
        self.dispatched: Prefill | Decode | None = None
        self.computed: dict[Request, int] = {}  # positions whose keys and values the pages hold

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.scheduler.add(request)

    def end(self, request: Request, reason: str) -> None:
        assert request.request_id not in self.ended
        self.ended[request.request_id] = reason
        self.scheduler.finish(request)

    def step(self, token: int) -> bool:
        """One engine step; whether anything was done."""
        step = self.scheduler.schedule()
        if step:
            self.check_step(step)
        self.check_accounting()
        before, self.dispatched = (self.dispatched, step) if self.ahead else (step, None)
        if before:
            self.collect(before, token)
        self.check_accounting()
        return bool(step or before)

    def check_step(self, step: Prefill | Decode) -> None:
        if isinstance(step, Prefill):
            assert 0 < sum(chunk.count for chunk in step.chunks) <= self.budget
            assert len(step.chunks) <= 2
            for chunk in step.chunks:
                assert chunk.start == (self.computed.get(chunk.request, 0) if chunk.start else 0)
                known = len(chunk.request.prompt_token_ids) + len(chunk.request.output_token_ids)
                self.computed[chunk.request] = chunk.start + chunk.count
                assert self.computed[chunk.request] <= known
                self.check_pages(chunk.request)
        else:
            for request in step.requests:
                assert request.num_computed == self.computed[request] + 1
                self.computed[request] += 1
                self.check_pages(request)
        requests = step.requests if isinstance(step, Decode) else [chunk.request for chunk in step.chunks]
        assert len(set(requests)) == len(requests)

    def check_pages(self, request: Request) -> None:
        assert request.state is State.RUNNING
        assert request.num_computed <= len(request.pages) * PAGE

    def check_accounting(self) -> None:
        running = [request for request in self.requests if request.state is State.RUNNING]
        held = [page for request in running for page in request.pages]
        assert len(held) == len(set(held))
        assert self.pool.num_free + len(held) == self.pool.num_pages
        slots = [request.slot for request in running]
        assert len(slots) == len(set(slots)) <= self.max_num_seqs
        assert all(not request.pages for request in self.requests if request.state is not State.RUNNING)

    def collect(self, step: Prefill | Decode, token: int) -> None:
        requests = step.requests if isinstance(step, Decode) else [c.request for c in step.chunks if c.samples]
        for request in requests:
            request.in_flight -= 1
            if request.state is State.FINISHED:
                continue
            request.output_token_ids.append(token)
            if token == STOP_TOKEN:
                self.end(request, "stop")
            elif len(request.output_token_ids) == request.max_tokens:
                self.end(request, "length")

    def drain(self) -> None:
        for _ in range(5000):
            if not self.step(token=7):
                return
        raise AssertionError("the requests never end")


arrivals = st.tuples(st.just("add"), st.integers(1, 14), st.integers(1, 10), st.integers(0, 2))
steps = st.tuples(st.just("step"), st.sampled_from([7, 7, 7, STOP_TOKEN]))
aborts = st.tuples(st.just("abort"), st.integers(0, 30))


@settings(max_examples=300, deadline=None)
@given(
    history=st.lists(st.one_of(arrivals, steps, steps, aborts), max_size=60),
    num_pages=st.integers(6, 14),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 20),
    ahead=st.booleans(),
)
def test_after_any_history_pages_add_up_and_every_request_ends_exactly_once(
    history, num_pages, max_num_seqs, budget, ahead
):
    simulation = Simulation(num_pages=num_pages, max_num_seqs=max_num_seqs, budget=budget, ahead=ahead)
    for event, *values in history:
        if event == "add":
            prompt, max_tokens, priority = values
            name = str(len(simulation.requests))
            simulation.add(make_request(name, prompt, max_tokens, len(simulation.requests), priority))
        elif event == "step":
            simulation.step(values[0])
        elif simulation.requests:
            request = simulation.requests[values[0] % len(simulation.requests)]
            if request.state is not State.FINISHED:
                simulation.end(request, "abort")
            simulation.check_accounting()
    simulation.drain()
    assert simulation.ended.keys() == {request.request_id for request in simulation.requests}
    assert simulation.pool.num_free == num_pages
    for request in simulation.requests:
        if simulation.ended[request.request_id] == "length":
            assert len(request.output_token_ids) == request.max_tokens


def test_a_running_sequence_waits_no_longer_than_one_prefill_step():
    simulation = Simulation(num_pages=64, max_num_seqs=2, budget=8, ahead=False)
    simulation.add(make_request("short", 4, 50, 0))
    simulation.step(7)
    simulation.add(make_request("long", 120, 5, 1))
    kinds = []
    for _ in range(20):
        kinds.append(type(simulation.scheduler.schedule()))
        simulation.requests[0].in_flight = 0
        simulation.requests[0].output_token_ids.append(7)
    assert (Prefill, Prefill) not in list(itertools.pairwise(kinds))
    assert kinds.count(Prefill) >= 9


def test_lower_priority_values_and_earlier_arrivals_are_admitted_first():
    simulation = Simulation(num_pages=64, max_num_seqs=1, budget=64, ahead=False)
    for name, priority in (("late", 1), ("first", 0), ("second", 0)):
        simulation.add(make_request(name, 3, 1, len(simulation.requests), priority))
    simulation.drain()
    assert list(simulation.ended) == ["first", "second", "late"]


def test_when_pages_run_out_the_last_in_order_gives_way_and_still_finishes():
    simulation = Simulation(num_pages=8, max_num_seqs=3, budget=64, ahead=True)
    for index in range(3):
        simulation.add(make_request(str(index), 4, 16, index))
    simulation.drain()
    assert simulation.scheduler.num_preemptions > 0
    assert simulation.ended == {"0": "length", "1": "length", "2": "length"}
    assert next(iter(simulation.ended)) == "0"


def test_the_pool_refuses_what_it_does_not_hold():
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(ValueError, match="2 pages wanted and 1 free"):
        pool.take(2)
    with pytest.raises(ValueError, match="not held"):
        pool.give_back([*pages, 2])
    assert pool.num_free == 1
    pool.give_back(pages)
    assert pool.num_free == 3


def test_requests_are_told_apart_by_identity():
    """Two requests of equal content are two entries in every set and dict of the engine."""
    request = make_request("a", 3, 3, 0)
    assert request != dataclasses.replace(request)
