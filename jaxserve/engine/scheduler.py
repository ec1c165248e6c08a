"""Which sequences run next, and on which pages. Plain Python: no arrays, no device."""

import dataclasses
import heapq
import itertools

from jaxserve.engine.page_pool import PagePool
from jaxserve.engine.request import Request, State


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The part of a sequence that one prefill step computes: `count` tokens from position `start` on."""

    request: Request
    start: int
    count: int
    samples: bool  # whether it reaches the sequence's last token, and so yields a new one


@dataclasses.dataclass(frozen=True)
class Prefill:
    chunks: list[Chunk]


@dataclasses.dataclass(frozen=True)
class Decode:
    """One new token for each request; `new_pages[i]` is the page that request `i` enters with it, or None."""

    requests: list[Request]
    new_pages: list[int | None]


class Scheduler:
    """Continuous batching over a fixed number of slots and a page pool.

    Prefill and decode take turns while there is work for both, so that running sequences wait no longer than one
    prefill step. A sequence is admitted when the pages of all its known tokens are free, in the order of priority and
    arrival; it takes further pages as it grows. When none is left, the last in that order gives its pages back and is
    computed again later.
    """

    def __init__(
        self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int, max_prefill_seqs: int, page_size: int
    ):
        self._pool = pool
        self._token_budget = max_num_batched_tokens
        self._max_prefill_seqs = max_prefill_seqs
        self._page_size = page_size
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._running: list[Request] = []
        self._waiting: list[tuple[tuple[int, int], int, Request]] = []  # a heap; finished ones are dropped on the way
        self._tie = itertools.count()
        self._prefilled_last = False
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(request.state is State.WAITING for _, _, request in self._waiting)

    def add(self, request: Request) -> None:
        """Put a request into the queue."""
        request.state = State.WAITING
        heapq.heappush(self._waiting, (request.order, next(self._tie), request))

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages are free at once. No effect on one that has ended."""
        if request.state is State.RUNNING:
            self._release(request)
        request.state = State.FINISHED

    def schedule(self) -> Prefill | Decode | None:
        """The next step, or None while nothing can run. The requests' counters then stand as after that step."""
        step: Prefill | Decode | None = None
        if not self._prefilled_last:
            step = self._prefill() or self._decode()
        else:
            step = self._decode() or self._prefill()
        self._prefilled_last = isinstance(step, Prefill)
        return step

    # Prefill

    def _prefill(self) -> Prefill | None:
        chunks: list[Chunk] = []
        budget = self._token_budget
        unfinished = iter(sorted((r for r in self._running if not r.decoding), key=lambda r: r.order))
        while budget and len(chunks) < self._max_prefill_seqs:
            request = next(unfinished, None) or self._admit()
            if request is None:
                break
            budget -= self._take_chunk(request, budget, chunks)
        return Prefill(chunks) if chunks else None

    def _take_chunk(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        start = request.num_computed
        count = min(budget, request.num_tokens - start)
        samples = start + count == request.num_tokens
        chunks.append(Chunk(request, start, count, samples))
        request.num_computed += count
        request.in_flight += samples
        request.decoding = samples
        return count

    def _admit(self) -> Request | None:
        while self._waiting and self._waiting[0][2].state is not State.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._free_slots:
            return None
        request = self._waiting[0][2]
        needed = -(-request.num_tokens // self._page_size)
        # A page in reserve for each running sequence keeps the newcomer from being preempted at once.
        if self._pool.num_free < needed + len(self._running):
            return None
        heapq.heappop(self._waiting)
        request.pages = self._pool.take(needed)
        request.slot = self._free_slots.pop()
        request.state = State.RUNNING
        self._running.append(request)
        return request

    # Decode

    def _decode(self) -> Decode | None:
        requests: list[Request] = []
        new_pages: list[int | None] = []
        growing = [r for r in self._running if r.decoding and r.num_output_tokens < r.max_tokens]
        for request in sorted(growing, key=lambda r: r.order):
            if request.state is not State.RUNNING:  # preempted for one before it
                continue
            full = request.num_tokens > len(request.pages) * self._page_size
            if full and not self._make_room(request):
                continue
            page = self._pool.take(1)[0] if full else None
            if page is not None:
                request.pages.append(page)
            requests.append(request)
            new_pages.append(page)
        for request in requests:
            request.num_computed += 1
            request.in_flight += 1
        return Decode(requests, new_pages) if requests else None

    def _make_room(self, request: Request) -> bool:
        """Preempt until a page is free. False if `request` itself had to go."""
        while self._pool.num_free == 0:
            victim = max(self._running, key=lambda r: r.order)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.num_computed = 0
        self.num_preemptions += 1
        self.add(request)

    def _release(self, request: Request) -> None:
        self._pool.give_back(request.pages)
        self._free_slots.append(request.slot)
        self._running.remove(request)
        request.pages, request.slot = [], -1
