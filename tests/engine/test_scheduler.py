"""Scheduler and page pool through random histories, with a stand-in for the device that answers a step late."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.page_pool import NO_PAGE, PagePool, page_keys, root_key
from jaxserve.engine.page_tables import PageTables
from jaxserve.engine.request import Request, State
from jaxserve.engine.scheduler import Decode, Prefill, Scheduler
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.step_batch import Needs
from jaxserve.sampling_params import SamplingParams

PAGE = 4
STOP_TOKEN = 1


def make_request(
    name: str,
    prompt: int,
    max_tokens: int,
    arrival: int,
    priority: int = 0,
    cached: bool = True,
    constrained: bool = False,
):
    return Request(
        name,
        list(range(10, 10 + prompt)),  # each prompt begins as every longer one does
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        arrival=arrival,
        priority=priority,
        stop_token_ids=frozenset([STOP_TOKEN]),
        cache_salt=b"" if cached else None,
        needs=int(Needs.MASK) if constrained else 0,
        constraint=object() if constrained else None,  # type: ignore[arg-type]
    )


def layout_of(*windows: int | None, budget: int) -> CacheLayout:
    """Groups of layers that see so many positions."""
    return CacheLayout(windows, (), PAGE, max(budget, PAGE))


def requests_of(step: Prefill | Decode) -> list[Request]:
    if isinstance(step, Decode):
        return step.requests
    return [chunk.request for chunk in step.chunks] + (step.decode.requests if step.decode else [])


class Simulation:
    """An engine without a device: checks every step's promises, and hands out the tokens that come.

    It keeps what each page holds: whose layers' group, and at every position, the tokens up to there.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        max_num_seqs: int,
        budget: int,
        ahead: bool,
        burst: int = 1,
        windows: tuple[int | None, ...] = (None,),
        mixed: bool = False,
    ):
        self.pool = PagePool(num_pages)
        self.windows = windows
        self.budget, self.max_num_seqs, self.ahead = budget, max_num_seqs, ahead
        self.scheduler = Scheduler(
            PageTables(self.pool, layout_of(*windows, budget=budget)),
            max_num_seqs=max_num_seqs,
            max_prefill_seqs=2,
            page_size=PAGE,
            prefill_budget=lambda positions, depth: budget,
            decode_steps=lambda sequences: burst,
            mixed=mixed,
        )
        self.requests: list[Request] = []
        self.ended: dict[str, str] = {}
        self.dispatched: tuple[Prefill | Decode, list[list[int]]] | None = None
        self.sequences: dict[Request, list[int]] = {}  # all tokens, with those that the host has not seen
        self.content: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}  # by page and offset

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.sequences[request] = list(request.prompt_token_ids)
        self.scheduler.add(request)

    def end(self, request: Request, reason: str) -> None:
        assert request.request_id not in self.ended
        self.ended[request.request_id] = reason
        self.scheduler.finish(request)

    def step(self, token: int) -> bool:
        """One engine step, in which the device samples `token` for everyone; whether anything was done."""
        step = self.scheduler.schedule()
        sampled = self.run(step, token) if step else None
        self.check_accounting()
        before, self.dispatched = (self.dispatched, sampled) if self.ahead else (sampled, None)
        if before:
            self.collect(*before)
        self.check_accounting()
        return bool(step or before)

    # The device's part

    def run(self, step: Prefill | Decode, token: int) -> tuple[Prefill | Decode, list[list[int]]]:
        requests = requests_of(step)
        assert len(set(requests)) == len(requests)
        if isinstance(step, Decode):
            return step, self.run_decode(step, token)
        assert 0 < sum(chunk.count for chunk in step.chunks) <= self.budget
        assert len(step.chunks) <= 2
        for chunk in step.chunks:
            assert chunk.request.state is State.RUNNING
            assert 0 < chunk.count <= chunk.request.num_known - chunk.start
            self.write(chunk.request, chunk.start, chunk.count)
        decoded = []
        if step.decode:
            assert step.decode.steps == 1
            assert all(request.state is State.RUNNING for request in step.decode.requests)
            decoded = self.run_decode(step.decode, token)
        sampled = []
        for chunk in step.chunks:  # after all have written, as in a program
            self.check_readable(chunk.request, chunk.start, chunk.start + chunk.count)
            assert chunk.samples == (chunk.start + chunk.count == len(self.sequences[chunk.request]))
            sampled.append([token] if chunk.samples else [])
            self.sequences[chunk.request] += sampled[-1]
        return step, sampled + decoded

    def run_decode(self, step: Decode, token: int) -> list[list[int]]:
        sampled = []
        rows = zip(step.requests, step.positions.tolist(), step.counts.tolist(), strict=True)
        for request, position, count in rows:
            assert 1 <= count <= step.steps
            if self.sequences[request][-1] == STOP_TOKEN:  # it has ended, and the host does not know it yet
                sampled.append([0] * count)
                continue
            assert position == len(self.sequences[request]) - 1
            if request.constraint:  # which depends on all tokens before
                assert (request.num_known, count) == (position + 1, 1)
            new = []
            for _ in range(count):
                self.write(request, len(self.sequences[request]) - 1, 1)
                self.check_readable(request, len(self.sequences[request]) - 1, len(self.sequences[request]))
                new.append(token)
                self.sequences[request].append(token)
                if token == STOP_TOKEN:
                    break
            sampled.append(new)
        return sampled

    def write(self, request: Request, start: int, count: int) -> None:
        for group, row in enumerate(request.pages):
            for position in range(start, start + count):
                page = row[position // PAGE]
                assert page != NO_PAGE
                written = group, tuple(self.sequences[request][: position + 1])
                self.content[page, position % PAGE] = written
                for other in self.requests:
                    for other_group, other_row in enumerate(other.pages):
                        if page in other_row:
                            held = other_group, tuple(self.sequences[other][: position + 1])
                            assert held == written, "written over what another reads"

    def check_readable(self, request: Request, start: int, stop: int) -> None:
        """Every position that queries `start` to `stop` see holds what this sequence's tokens make it hold.

        Whoever computed it, and in the pages of each group of layers.
        """
        for group, (row, window) in enumerate(zip(request.pages, self.windows, strict=True)):
            for position in range(0 if window is None else max(0, start - window + 1), stop):
                found = self.content[row[position // PAGE], position % PAGE]
                assert found == (group, tuple(self.sequences[request][: position + 1]))

    # The engine's part

    def collect(self, step: Prefill | Decode, sampled: list[list[int]]) -> None:
        for request, tokens in zip(requests_of(step), sampled, strict=True):
            for token in tokens:
                if request.state is State.FINISHED:
                    break
                request.output_token_ids.append(token)
                if request.constraint:
                    self.scheduler.saw_token(request)
                if token == STOP_TOKEN:
                    self.end(request, "stop")
                elif len(request.output_token_ids) == request.max_tokens:
                    self.end(request, "length")

    def check_accounting(self) -> None:
        running = [request for request in self.requests if request.state is State.RUNNING]
        rows = [[page for page in row if page != NO_PAGE] for request in running for row in request.pages]
        assert self.pool.num_held == len({page for row in rows for page in row})
        assert all(len(set(row)) == len(row) for row in rows)
        slots = [request.slot for request in running]
        assert len(slots) == len(set(slots)) == self.scheduler.num_running <= self.max_num_seqs
        assert all(not request.pages for request in self.requests if request.state is not State.RUNNING)
        assert self.scheduler.num_waiting == sum(request.state is State.WAITING for request in self.requests)

    def drain(self) -> None:
        for _ in range(5000):
            if not self.step(token=7):
                return
        raise AssertionError("the requests never end")


LONGEST = 24
arrivals = st.tuples(
    st.just("add"), st.integers(1, 14), st.integers(1, LONGEST - 14), st.integers(0, 2), *[st.booleans()] * 2
)
steps = st.tuples(st.just("step"), st.sampled_from([7, 7, 7, STOP_TOKEN]))
aborts = st.tuples(st.just("abort"), st.integers(0, 30))


@settings(max_examples=300, deadline=None)
@given(
    history=st.lists(st.one_of(arrivals, steps, steps, aborts), max_size=60),
    windows=st.sampled_from([(None,), (None,), (5,), (1,), (None, 3), (9, None), (6, 2, None)]),
    spare_pages=st.integers(0, 8),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 20),
    ahead=st.booleans(),
    burst=st.sampled_from([1, 1, 3, 4]),
    mixed=st.booleans(),
)
def test_after_any_history_pages_add_up_hold_what_they_should_and_every_request_ends_exactly_once(
    history, windows, spare_pages, max_num_seqs, budget, ahead, burst, mixed
):
    num_pages = layout_of(*windows, budget=budget).pages_of(LONGEST) + spare_pages
    simulation = Simulation(
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        budget=budget,
        ahead=ahead,
        burst=burst,
        windows=windows,
        mixed=mixed,
    )
    for event, *values in history:
        if event == "add":
            prompt, max_tokens, priority, cached, constrained = values
            index = len(simulation.requests)
            simulation.add(make_request(str(index), prompt, max_tokens, index, priority, cached, constrained))
        elif event == "step":
            simulation.step(values[0])
        elif simulation.requests:
            request = simulation.requests[values[0] % len(simulation.requests)]
            if request.state is not State.FINISHED:
                simulation.end(request, "abort")
            simulation.check_accounting()
    simulation.drain()
    assert simulation.ended.keys() == {request.request_id for request in simulation.requests}
    assert simulation.pool.num_available == num_pages
    for request in simulation.requests:
        if simulation.ended[request.request_id] == "length":
            assert len(request.output_token_ids) == request.max_tokens


def test_requests_that_arrive_together_share_the_prefix_that_the_first_computes():
    simulation = Simulation(num_pages=64, max_num_seqs=4, budget=64, ahead=True)
    first, second = make_request("a", 14, 2, 0), make_request("b", 14, 2, 1)
    simulation.add(first)
    simulation.add(second)
    simulation.step(7)
    assert second.num_cached == 12
    assert second.pages[0][:3] == first.pages[0][:3]
    assert second.pages[0][3] != first.pages[0][3]
    simulation.drain()
    assert (simulation.scheduler.prefix_cache_queries, simulation.scheduler.prefix_cache_hits) == (28, 12)


def test_a_finished_sequence_leaves_its_full_pages_to_those_that_continue_it():
    simulation = Simulation(num_pages=64, max_num_seqs=4, budget=64, ahead=True)
    first = make_request("a", 6, 7, 0)
    simulation.add(first)
    simulation.drain()
    follower = make_request("b", 0, 2, 1)
    follower.prompt_token_ids = [*simulation.sequences[first][:13], 99]
    simulation.add(follower)
    simulation.drain()
    assert follower.num_cached == 12


def test_sequences_of_different_salts_share_nothing():
    simulation = Simulation(num_pages=64, max_num_seqs=4, budget=64, ahead=True)
    for name, salt in (("a", "one"), ("b", "two"), ("c", "one")):
        request = make_request(name, 9, 1, len(simulation.requests))
        request.cache_salt = root_key(salt)
        simulation.add(request)
    simulation.drain()
    assert [request.num_cached for request in simulation.requests] == [0, 0, 8]


def test_a_decode_step_brings_one_token_while_others_wait_and_a_burst_when_none_does():
    simulation = Simulation(num_pages=64, max_num_seqs=1, budget=64, ahead=False, burst=3)
    simulation.add(make_request("a", 4, 12, 0))
    waiting = make_request("b", 4, 2, 1)
    simulation.step(7)
    simulation.step(7)
    assert len(simulation.requests[0].output_token_ids) == 4
    simulation.add(waiting)
    simulation.step(7)
    assert len(simulation.requests[0].output_token_ids) == 5


def test_a_running_sequence_waits_no_longer_than_one_prefill_step():
    simulation = Simulation(num_pages=64, max_num_seqs=2, budget=8, ahead=False)
    simulation.add(make_request("short", 4, 50, 0))
    simulation.step(7)
    simulation.add(make_request("long", 120, 5, 1))
    kinds = []
    for _ in range(20):
        kinds.append(type(simulation.scheduler.schedule()))
    assert (Prefill, Prefill) not in list(itertools.pairwise(kinds))
    assert kinds.count(Prefill) >= 9


def test_a_running_sequence_gets_its_next_token_in_every_step_of_a_prompt_that_shares_them():
    simulation = Simulation(num_pages=64, max_num_seqs=2, budget=8, ahead=False, mixed=True)
    short, long = make_request("short", 4, 50, 0), make_request("long", 120, 5, 1)
    simulation.add(short)
    simulation.step(7)
    simulation.add(long)
    for count in range(2, 17):
        simulation.step(7)
        assert len(short.output_token_ids) == count
    assert len(long.output_token_ids) == 1


def test_a_prompt_that_lacks_pages_beside_running_sequences_takes_them_in_a_step_of_its_own():
    simulation = Simulation(num_pages=5, max_num_seqs=2, budget=4, ahead=True, mixed=True, windows=(6,))
    simulation.add(make_request("last", 3, 20, 0, priority=1))
    for _ in range(8):
        simulation.step(7)
    first = make_request("first", 14, 4, 1, cached=False)
    simulation.add(first)
    simulation.drain()
    assert list(simulation.ended) == ["first", "last"]
    assert simulation.scheduler.num_preemptions > 0


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
    with pytest.raises(ValueError, match="2 pages wanted and 1 available"):
        pool.take(2)
    with pytest.raises(ValueError, match="not held"):
        pool.give_back([*pages, 2])
    assert pool.num_available == 1
    pool.give_back(pages)
    assert pool.num_available == 3


def test_the_pool_overwrites_the_least_recently_used_cached_page_first_and_a_sequences_end_before_its_beginning():
    pool = PagePool(5)
    keys = page_keys(range(4 * PAGE), PAGE)

    def known() -> list[int]:
        return [pool.page_of(0, key) for key in keys]

    old, new = pool.take(2), pool.take(2)
    for page, key in zip(old + new, keys, strict=True):
        pool.name(0, page, key)
    pool.give_back(old)
    pool.give_back(new)
    assert (pool.num_cached, pool.num_available) == (4, 5)
    assert known() == old + new
    assert pool.page_of(1, keys[0]) == NO_PAGE  # another group's layers have not computed it
    pool.take(2)  # the free page, and the end of the older sequence
    assert known() == [old[0], NO_PAGE, *new]
    pool.share(old[:1])
    assert pool.num_available == 2
    pool.take(2)
    assert known() == [old[0], NO_PAGE, NO_PAGE, NO_PAGE]
    pool.forget()
    assert known() == [NO_PAGE] * 4
    pool.give_back(old[:1])
    assert (pool.num_cached, pool.num_available) == (0, 1)


def test_layers_with_a_window_hold_no_page_that_lies_behind_it():
    simulation = Simulation(num_pages=64, max_num_seqs=1, budget=8, ahead=True, windows=(None, 6))
    request = make_request("a", 40, 40, 0)
    simulation.add(request)
    held = []
    while simulation.step(7):
        if request.pages:
            rows = [[page for page in row if page != NO_PAGE] for row in request.pages]
            held.append([len(row) for row in rows])
    layout = layout_of(None, 6, budget=8)
    assert max(keeping for keeping, _ in held) == layout.pages_of_group(0, 80) == 20
    assert max(sliding for _, sliding in held) == layout.pages_of_group(1, 80) == 4
    assert held[-1][1] == 3


def test_a_prefix_is_found_if_all_that_its_followers_see_of_it_is_cached():
    simulation = Simulation(num_pages=40, max_num_seqs=1, budget=64, ahead=True, windows=(None, 6))
    simulation.add(make_request("a", 41, 2, 0))
    simulation.drain()
    again = make_request("b", 41, 1, 1)
    simulation.add(again)
    simulation.step(7)
    assert again.num_cached == 40
    assert [page != NO_PAGE for page in again.pages[1]] == [False] * 8 + [True] * 3  # 40 - 6 + 1 lies in page 8
    simulation.drain()
    # Shorter prefixes lack the pages that the window has left behind only once those are overwritten.
    shorter = make_request("c", 25, 1, 2)
    simulation.add(shorter)
    simulation.step(7)
    assert shorter.num_cached == 24


def test_a_pages_key_stands_for_all_tokens_before_it():
    keys = page_keys([1, 2, 3, 4, 5, 6, 7, 8, 9], PAGE)
    assert len(keys) == 2
    assert page_keys([1, 2, 3, 4, 5, 6, 7, 8], PAGE) == keys
    assert page_keys([0, 2, 3, 4, 5, 6, 7, 8], PAGE)[1] != keys[1]
    assert page_keys([5, 6, 7, 8], PAGE, keys[0]) == keys[1:]


def test_requests_are_told_apart_by_identity():
    """Two requests of equal content are two entries in every set and dict of the engine."""
    request = make_request("a", 3, 3, 0)
    assert request != dataclasses.replace(request)
