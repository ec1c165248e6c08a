"""Which pages each running sequence holds, a row of them for each group of layers, and what of it the cache knows."""

import itertools

from jaxserve.engine.page_pool import NO_PAGE, PagePool
from jaxserve.engine.request import Request
from jaxserve.runner.cache_layout import CacheLayout


class PageTables:
    """Takes pages for sequences as they grow, lets go what their layers no longer look at, and names what is full.

    Entry `i` of `request.pages[g]` is the page of group `g`'s layers for the `i`-th whole page of positions, or
    `NO_PAGE` where no later query looks.
    """

    def __init__(self, pool: PagePool, layout: CacheLayout):
        self.pool, self._layout, self._page_size = pool, layout, layout.page_size
        self._groups = range(len(layout.windows))
        self._keeping = [group for group in self._groups if layout.windows[group] is None]
        self._sliding = [group for group in self._groups if layout.windows[group] is not None]

    @property
    def pages_to_grow(self) -> int:
        """Pages that a sequence takes when it enters a new one."""
        return len(self._groups)

    def admit(self, request: Request, *, reserve: int) -> bool:
        """Give a sequence the pages that it begins with, cached ones as far as its tokens are known.

        Groups that keep everything get the pages of all its tokens, others those of a first step. False, with nothing
        changed, if that would leave fewer than `reserve` pages for each group.
        """
        known = request.num_known
        # The last token is always computed: the next one comes from it.
        cached, rows = self._find(request, known - 1)
        first_step = min(known, cached * self._page_size + self._layout.max_step_tokens)
        ends = [self._pages(known if window is None else first_step) for window in self._layout.windows]
        needed = [end - len(row) for end, row in zip(ends, rows, strict=True)]
        found = [page for page in _by_position(rows) if page != NO_PAGE]
        if self.pool.num_available_beside(found) < sum(needed) + reserve * self.pages_to_grow:
            return False
        self.pool.share(found)
        request.pages = [row + self.pool.take(count) for row, count in zip(rows, needed, strict=True)]
        request.num_computed = cached * self._page_size
        return True

    def missing(self, request: Request, tokens: int) -> int:
        """Pages that `extend` would take."""
        return sum(max(0, self._pages(tokens) - len(row)) for row in request.pages)

    def extend(self, request: Request, tokens: int) -> None:
        """Hold pages for all of a sequence's first `tokens` tokens that are still looked at."""
        for row in request.pages:
            row += self.pool.take(max(0, self._pages(tokens) - len(row)))

    def slide(self, request: Request, position: int) -> None:
        """Let go what no query from `position` on sees. All tokens before it are computed, or will be by then.

        Whatever is dispatched from now on, this sequence's own queries from `position` on too, may overwrite it.
        """
        for group in self._sliding:
            row, end = request.pages[group], self._first_page(group, position)
            start = end
            while start and row[start - 1] != NO_PAGE:
                start -= 1
            if start < end:
                self._name(request, position, group, start)
                self.pool.give_back(row[start:end])
                row[start:end] = [NO_PAGE] * (end - start)

    def name(self, request: Request, computed: int, first: int = 0) -> None:
        """Let the prefix cache know the full pages, from the `first` on, of the first `computed` tokens."""
        for group in self._groups:
            self._name(request, computed, group, first)

    def release(self, request: Request, computed: int) -> None:
        """Give all pages back; the cache keeps the full ones of the first `computed` tokens."""
        self.name(request, computed)
        self.pool.give_back([page for page in _by_position(request.pages) if page != NO_PAGE])
        request.pages = []

    def _name(self, request: Request, computed: int, group: int, first: int) -> None:
        keys = request.keys_of_full_pages(min(computed, request.num_known), self._page_size)
        for page, key in zip(request.pages[group][first:], keys[first:], strict=False):
            if page != NO_PAGE:
                self.pool.name(group, page, key)

    def _find(self, request: Request, tokens: int) -> tuple[int, list[list[int]]]:
        """The most pages within the first `tokens` tokens whose followers find cached all that they look at; these."""
        rows: list[list[int]] = [[] for _ in self._groups]
        runs = [0] * len(rows)  # of known pages up to here
        longest = 0
        for count, key in enumerate(request.keys_of_full_pages(tokens, self._page_size), 1):
            for group, row in enumerate(rows):
                row.append(self.pool.page_of(group, key))
                runs[group] = 0 if row[-1] == NO_PAGE else runs[group] + 1
            if any(runs[group] < count for group in self._keeping):
                break
            following = count * self._page_size
            if all(runs[group] >= count - self._first_page(group, following) for group in self._sliding):
                longest = count
        first = [self._first_page(group, longest * self._page_size) for group in self._groups]
        return longest, [[NO_PAGE] * start + row[start:longest] for start, row in zip(first, rows, strict=True)]

    def _first_page(self, group: int, position: int) -> int:
        """The first of the pages that a query at `position` sees."""
        window = self._layout.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self._page_size

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _by_position(rows: list[list[int]]) -> list[int]:
    """All groups' pages, those of the first positions first."""
    return list(itertools.chain.from_iterable(itertools.zip_longest(*rows, fillvalue=NO_PAGE)))
