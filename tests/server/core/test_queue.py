"""What may wait, counted right whatever happens to those who wait."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import InputError
from jaxserve.server.core.queue import Queue
from jaxserve.server.failures import Overloaded


def test_as_many_completions_as_there_are_slots_do_not_wait() -> None:
    queue = Queue(slots=4, max_requests=2, max_tokens=100)
    with contextlib.ExitStack() as places:
        for _ in range(3):
            places.enter_context(queue.place(2))
        with pytest.raises(Overloaded, match="2 completions wait and at most 2 may"):
            queue.place(1)
    assert queue.requests == 0
    queue.place(1)


def test_what_could_never_wait_is_the_callers_mistake() -> None:
    with pytest.raises(InputError, match="for 3 completions and at most 2 may wait"):
        Queue(slots=4, max_requests=2, max_tokens=100).place(3)


def test_tokens_wait_until_they_begin() -> None:
    queue = Queue(slots=4, max_requests=9, max_tokens=100)
    with queue.place(1) as first, queue.place(1) as second:
        first.take_tokens(1000)  # nothing else waits
        with pytest.raises(Overloaded, match="1000 prompt tokens wait and at most 100 may"):
            second.take_tokens(1)
        first.begin(1000)
        second.take_tokens(100)
    assert queue.tokens == 0


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 60), st.sampled_from(["leave", "begin", "end"]))))
def test_nothing_is_counted_once_all_have_left(callers: list[tuple[int, int, str]]) -> None:
    queue = Queue(slots=2, max_requests=5, max_tokens=100)
    with contextlib.ExitStack() as places:
        for requests, tokens, what in callers:
            with contextlib.suppress(Overloaded):
                place = places.enter_context(queue.place(requests))
                place.take_tokens(tokens)
                if what != "leave":
                    place.begin(tokens)
                if what == "end":
                    place.end(requests)
            assert 0 <= queue.requests <= 7
            assert 0 <= queue.tokens <= 100
    assert (queue.requests, queue.tokens) == (0, 0)
