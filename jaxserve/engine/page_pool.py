"""Which pages of the device's page pool are free. Plain numbers; the pages themselves are the runner's."""


class PagePool:
    """Hands out page numbers. After any history, free and held pages together are all pages."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, or `ValueError` if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted and {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Free `pages`; `ValueError` for one that is not held, and then none is freed."""
        if not self._held.issuperset(pages) or len(set(pages)) != len(pages):
            raise ValueError(f"pages {sorted(set(pages) - self._held)} are not held")
        self._held.difference_update(pages)
        self._free.extend(reversed(pages))
