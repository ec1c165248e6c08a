"""Which pages of the device's page pool are free, held or cached. Plain numbers; the pages themselves are the runner's.

A page whose positions are all computed can be given its key, which stands for every token up to its end. It is then
found again by whoever needs the same prefix: at once by others beside its holder, and after that until the space is
wanted for something else, least recently used first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = bytes
NO_PAGE = -1


def root_key(salt: str, adapter: int = 0) -> Key:
    """What the first page's key is made from: contents of other salts or adapters are never found for one another."""
    told = f"{adapter}:{salt}".encode()
    return hashlib.blake2b(told, digest_size=16).digest() if salt or adapter else b""


def page_keys(token_ids: Sequence[int], page_size: int, before: Key = b"") -> list[Key]:
    """The keys of the full pages that `token_ids` fill, each a hash of all tokens up to the page's end.

    `before` is the key of the page before the first token, or whatever else tells contents of equal tokens apart.
    """
    keys = []
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        page = array("i", token_ids[start : start + page_size]).tobytes()
        before = hashlib.blake2b(before + page, digest_size=16).digest()
        keys.append(before)
    return keys


class PagePool:
    """Hands out page numbers. After any history, free, held and cached pages together are all pages.

    A held page has one holder or more; a cached page has a key and no holder.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._names: dict[int, tuple[int, Key]] = {}
        self._pages: dict[tuple[int, Key], int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: free ones, and cached ones that it would overwrite."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def take(self, count: int) -> list[int]:
        """`count` pages for a first holder, or `ValueError` if fewer are available."""
        if count > self.num_available:
            raise ValueError(f"{count} pages wanted and {self.num_available} available")
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Let go of `pages`, the first of a sequence first; `ValueError` for one that is not held, and then none is."""
        if len(set(pages)) != len(pages) or not all(self._holders[page] for page in pages):
            raise ValueError(f"pages {[page for page in pages if not self._holders[page]]} are not held")
        # The last pages of a sequence are of use only with the ones before them, so they go first.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._cached[page] = None
            else:
                self._free.append(page)

    # The prefix cache

    def name(self, group: int, page: int, key: Key) -> None:
        """Let a held page of a group of layers be found by its key. Of two of the same content the first is kept."""
        if (group, key) not in self._pages and page not in self._names:
            self._pages[group, key] = page
            self._names[page] = group, key

    def page_of(self, group: int, key: Key) -> int:
        """The page of that name, or `NO_PAGE`."""
        return self._pages.get((group, key), NO_PAGE)

    def num_available_beside(self, pages: Iterable[int]) -> int:
        """What `take` could give after `share(pages)`."""
        return self.num_available - sum(page in self._cached for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Become one more holder of `pages` that were found by their keys."""
        for page in pages:
            self._holders[page] += 1
            self._cached.pop(page, None)

    def forget(self) -> None:
        """Make every page unknown: its content is no longer what its key says."""
        self._free += self._cached
        self._cached.clear()
        self._names.clear()
        self._pages.clear()

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._pages[self._names.pop(page)]
        return page
