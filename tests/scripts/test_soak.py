"""The soak: a few seconds of it, and that it tells a leak from none."""

import dataclasses
from collections import Counter

import pytest

from scripts import soak
from scripts.soak import Sample, failures, growth


def test_a_server_that_is_kept_busy_leaks_nothing(capsys: pytest.CaptureFixture) -> None:
    # Memory still grows to its usual size in so short a time.
    soak.main(["--minutes", "0.1", "--max-growth", "400"])
    printed = capsys.readouterr().out
    assert "Nothing leaks." in printed
    assert all(kind in printed for kind in soak.KINDS)


def sample(at: float, **values: float) -> Sample:
    names = [*soak.MEMORY.values(), *soak.COUNTS.values(), *soak.PAGES, soak.WAITING, soak.RUNNING]
    return Sample(at, dict.fromkeys(names, 8.0 * 2**20) | values)


GOOD = Counter({("stream", "answered"): 5, ("whole", "left"): 2})
FLAT = [sample(float(at)) for at in range(11)]


def test_growth_is_that_of_the_second_half() -> None:
    name = "process_resident_memory_bytes"
    rising = [sample(float(at), **{name: 2**20 * (100 + max(0, 5 - at))}) for at in range(11)]
    assert growth(rising, name) == pytest.approx(0, abs=0.01)
    leaking = [sample(float(at), **{name: 2**20 * (100 + 3 * at)}) for at in range(11)]
    assert growth(leaking, name) == pytest.approx(15)
    assert failures(leaking, GOOD, 16) == []
    assert failures(leaking, GOOD, 14) == ["memory of the server, MiB: grew by 15.0 in the second half, and may by 14"]


@pytest.mark.parametrize("name", soak.COUNTS.values())
def test_more_of_anything_than_before_is_a_leak(name: str) -> None:
    assert failures(FLAT, GOOD, 16) == []
    last = dataclasses.replace(FLAT[-1], values=FLAT[-1].values | {name: 9.0 * 2**20})
    assert failures([*FLAT[:-1], last], GOOD, 16)


def test_a_request_that_is_not_answered_and_a_server_that_is_not_busy_are_told() -> None:
    assert failures(FLAT, GOOD + Counter({("chat", "hung"): 1}), 16) == ["1 times chat hung"]
    assert failures(FLAT, Counter({("stream", "answered"): 5}), 16) == ["no request was left"]
    idle = [sample(float(at), **{soak.WAITING: 0.0}) for at in range(11)]
    assert failures(idle, GOOD, 16) == ["no request ever had to wait: the server was not saturated"]
