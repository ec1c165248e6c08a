"""Histograms."""

import bisect

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.stats import TOKEN_SECONDS, Histogram

VALUES = st.lists(st.one_of(st.floats(0, 200), st.sampled_from(TOKEN_SECONDS)), max_size=50)


@given(VALUES)
def test_values_lie_at_or_below_their_bound_however_they_are_added(values: list[float]) -> None:
    one_by_one, together = Histogram.of(TOKEN_SECONDS), Histogram.of(TOKEN_SECONDS)
    for value in values:
        one_by_one.add(value)
    together.add_all(np.array(values))
    assert one_by_one.counts == together.counts
    np.testing.assert_allclose(one_by_one.sum, together.sum)
    ordered = sorted(values)
    for place, bound in enumerate(TOKEN_SECONDS):
        assert sum(together.counts[: place + 1]) == bisect.bisect_right(ordered, bound)
    assert sum(together.counts) == len(values)
