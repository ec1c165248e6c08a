"""What an engine learns of its steps' seconds, against machines whose steps take what a formula says."""

import numpy as np
import pytest

from jaxserve.engine.pace import Pace
from jaxserve.runner.buckets import Buckets

STREAMS = np.full(16, 100)  # positions of decoding sequences


def buckets(mixed: bool) -> Buckets:
    return Buckets.of(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=9000, page_size=16, mixed=mixed)


class Machine:
    """A prefill step takes `fixed` seconds, and more for each token of its bucket and position attended to."""

    def __init__(self, *, mixed: bool, max_itl: float, per_position: float, noise: float = 0.0):
        self.buckets, self.mixed = buckets(mixed), mixed
        self.pace = Pace(self.buckets, max_decode_steps=8, max_itl=max_itl, burst=0.05)
        self.pace.observe_decode(16, 1, 0.03)
        self.per_position, self.noise, self.random = per_position, noise, np.random.default_rng(0)

    def prefill(self, length: int) -> list[tuple[int, float]]:
        """Compute a prompt beside the streams: tokens and seconds of each step."""
        depth, steps = 0, []
        while depth < length:
            count = min(self.pace.prefill_budget(STREAMS, depth), length - depth)
            shared = len(STREAMS) if self.mixed else 0
            size = self.buckets.prefill_for(count + shared, 1 + shared).tokens
            attended = count * depth + count * count // 2 + (int(STREAMS.sum()) if self.mixed else 0)
            seconds = 0.02 + 0.001 * size + self.per_position * attended
            seconds *= 1 + self.noise * self.random.standard_normal()
            self.pace.observe_prefill(size, attended, seconds)
            steps.append((count, seconds))
            depth += count
        return steps


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_steps_keep_the_bound_as_a_prompt_grows_deep_and_use_most_of_it(mixed, noise):
    bound = 0.15
    machine = Machine(mixed=mixed, max_itl=bound, per_position=1e-6, noise=noise)
    steps = machine.prefill(8192)
    waits = np.array([seconds + (0.0 if mixed else 0.03) for _, seconds in steps])
    assert np.percentile(waits, 95) <= bound * (1 + 2 * noise)
    assert np.median(waits) >= 0.7 * bound
    counts = [count for count, _ in steps]
    assert np.mean(counts[-20:]) < 0.7 * np.mean(counts[5:25])  # deep in a prompt a token costs more


def test_a_bound_that_cannot_be_kept_does_not_stop_a_prompt():
    steps = Machine(mixed=True, max_itl=0.001, per_position=1e-6).prefill(64)
    assert [count for count, _ in steps] == [16] + [8] * 6  # the first is a guess


@pytest.mark.parametrize(("mixed", "most"), [(False, 512), (True, 512 - 16)])
def test_without_a_bound_or_anyone_who_waits_steps_are_as_large_as_they_get(mixed, most):
    pace = Pace(buckets(mixed), max_decode_steps=8, max_itl=None, burst=0.05)
    assert pace.prefill_budget(STREAMS, 0) == most
    bounded = Pace(buckets(mixed), max_decode_steps=8, max_itl=0.01, burst=0.05)
    assert bounded.prefill_budget(STREAMS[:0], 5000) == 512
