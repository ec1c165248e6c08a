"""How layers share the page pool's arrays, so that those with a window need not keep what lies behind it. Plain Python.

Layers that look equally far back form a group, or several of equal size. A page is the same row of every array and
belongs to one group at a time, in which each layer has an array to itself. So pages of all groups are alike, and one
pool serves layers that keep everything beside layers that keep a window, in whatever proportion requests want.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class LayerPlace(NamedTuple):
    group: int
    array: int


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Where each layer's keys and values lie, and how many pages a sequence holds."""

    windows: tuple[int | None, ...]  # of each group: positions that a query sees, its own among them; None: all
    places: tuple[LayerPlace, ...]  # of each layer
    page_size: int
    max_step_tokens: int  # that one step computes of one sequence; a decode step at most a page

    @classmethod
    def of(
        cls, windows: Sequence[int | None], *, page_size: int, max_step_tokens: int, max_model_len: int
    ) -> "CacheLayout":
        """The layout that takes the least memory for a sequence of `max_model_len`; `windows` are the layers'."""
        windows = [None if window is None or window >= max_model_len else window for window in windows]
        layouts = [
            cls(*_spread(windows, arrays), page_size, max(max_step_tokens, page_size))
            for arrays in range(1, max(map(windows.count, windows)) + 1)
        ]
        # Every group costs the host a row of pages for each sequence: one more has to spare a hundredth of the memory.
        return min(layouts, key=lambda layout: layout._memory(max_model_len) * (100 + len(layout.windows)))

    @property
    def num_arrays(self) -> int:
        return 1 + max(place.array for place in self.places)

    def pages_of_group(self, group: int, length: int) -> int:
        """The most pages of a group that a sequence of `length` tokens holds at a time."""
        window = self.windows[group]
        whole = -(-length // self.page_size)
        return whole if window is None else min(whole, (window + self.max_step_tokens - 3) // self.page_size + 2)

    def pages_of(self, length: int) -> int:
        """The most pages that a sequence of `length` tokens holds at a time."""
        return sum(self.pages_of_group(group, length) for group in range(len(self.windows)))

    def longest_within(self, pages: int, limit: int) -> int:
        """The most tokens, in whole pages and up to `limit`, of a sequence that never holds more than `pages`."""
        lengths = range(0, limit + 1, self.page_size)
        return lengths[bisect.bisect_right(lengths, pages, key=self.pages_of) - 1]

    def _memory(self, length: int) -> int:
        return self.pages_of(length) * self.num_arrays


def _spread(windows: Sequence[int | None], arrays: int) -> tuple[tuple[int | None, ...], tuple[LayerPlace, ...]]:
    """Groups of at most `arrays` layers, as the layers come: their windows, and the place of each layer."""
    groups: list[int | None] = []
    filling: dict[int | None, LayerPlace] = {}  # by window: the place that its next layer takes
    places = []
    for window in windows:
        place = filling.get(window)
        if place is None or place.array == arrays:
            place = LayerPlace(len(groups), 0)
            groups.append(window)
        places.append(place)
        filling[window] = place._replace(array=place.array + 1)
    return tuple(groups), tuple(places)
