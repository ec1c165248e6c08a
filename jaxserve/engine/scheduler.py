"""Which sequences run next, and on which pages. Numpy and plain Python: nothing on a device."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable

import numpy as np

from jaxserve.engine.page_tables import PageTables
from jaxserve.engine.request import Request, State
from jaxserve.runner.step_batch import Needs


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The part of a sequence that one prefill step computes: `count` tokens from position `start` on."""

    request: Request
    start: int
    count: int
    first: bool  # whether it is the first since the sequence got its slot
    samples: bool  # whether it reaches the sequence's last token, and so yields a new one


@dataclasses.dataclass(frozen=True)
class Decode:
    """Up to `steps` new tokens for each request: `counts[i]` at most for request `i`, an entry of every array each."""

    requests: list[Request]
    slots: np.ndarray  # int32
    positions: np.ndarray  # int32: of the newest token, which goes in first
    counts: np.ndarray  # int32, 1 to `steps`
    new_pages: np.ndarray  # int32 [groups, requests]: the pages that the last of these tokens needs in addition, or -1
    steps: int
    needs: int  # of any of the requests


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Chunks of prompts, and in the same pass over the weights one new token for each request of `decode`."""

    chunks: list[Chunk]
    decode: Decode | None = None


class _Slots:
    """What a decode step needs of each running sequence, by slot, so that no step looks at them one by one."""

    def __init__(self, count: int):
        self.requests: list[Request | None] = [None] * count
        self.decoding = np.zeros(count, bool)  # whether only the newest token, which the device has, is not computed
        self.positions = np.zeros(count, np.int32)  # of that token
        self.room = np.zeros(count, np.int32)  # positions that the sequence's pages hold
        self.left = np.zeros(count, np.int32)  # tokens that may still be sampled
        self.needs = np.zeros(count, np.int32)
        self.unseen = np.zeros(count, bool)  # whether the host has to see the newest token before the next is sampled
        self.seen_at = np.full(count, np.nan)  # when it saw the newest of its tokens; NaN before it has seen one


class Scheduler:
    """Continuous batching over a fixed number of slots and a page pool's tables.

    While there is work for both, prefill and decode share steps if they can be `mixed`, and take turns if not, so that
    running sequences wait no longer than one prefill step. A sequence is admitted when the pages of all its known
    tokens are available (where layers have a window, those of its first step), in the order of priority and arrival;
    pages that the prefix cache has are shared and not computed again. It takes further pages as it grows. When none is
    left, the last in that order gives its pages back and is computed again later.

    A request whose next token depends on the host (`Needs.MASK`) sits out the steps that come before its newest token
    has been seen there; the others go on.

    `prefill_budget(positions, depth)` gives the most prompts' tokens of a prefill step that decoding sequences with
    their newest tokens at `positions` wait for, if a prompt goes on at position `depth` in it, and
    `decode_steps(sequences)` the most tokens that a decode step may bring each of them while nothing waits.
    """

    def __init__(
        self,
        tables: PageTables,
        *,
        max_num_seqs: int,
        max_prefill_seqs: int,
        page_size: int,
        prefill_budget: Callable[[np.ndarray, int], int],
        decode_steps: Callable[[int], int] = lambda sequences: 1,
        mixed: bool = False,
    ):
        self._tables = tables
        self._prefill_budget, self._decode_steps, self._mixed = prefill_budget, decode_steps, mixed
        self._max_prefill_seqs = max_prefill_seqs
        self._page_size = page_size
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._slots = _Slots(max_num_seqs)
        self._prefilling: list[Request] = []  # running, in order of service
        self._waiting: list[tuple[tuple[int, int], int, Request]] = []  # a heap; finished ones are dropped on the way
        self._tie = itertools.count()
        self._num_waiting = 0
        self._prefilled_last = False
        self._lacked_pages = False  # whether the last mixed step left a prompt out for want of pages
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens of newly admitted sequences, and how many of them were found
        self.prefix_cache_hits = 0

    @property
    def num_running(self) -> int:
        return len(self._slots.requests) - len(self._free_slots)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def add(self, request: Request) -> None:
        """Put a request into the queue."""
        request.state = State.WAITING
        self._num_waiting += 1
        heapq.heappush(self._waiting, (request.order, next(self._tie), request))

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages are free at once. No effect on one that has ended."""
        if request.state is State.RUNNING:
            self._release(request)
        elif request.state is State.WAITING:
            self._num_waiting -= 1
        request.state = State.FINISHED

    def saw_token(self, request: Request) -> None:
        """The host has seen a constrained request's newest token, so that it may go on; freely, if that ended it."""
        if request.constraint is None:
            request.needs &= ~Needs.MASK
        if request.state is State.RUNNING and self._slots.decoding[request.slot]:
            self._slots.needs[request.slot] = request.needs
            self._slots.unseen[request.slot] = False

    def saw_step(self, step: Prefill | Decode, now: float) -> np.ndarray:
        """The host sees a step's tokens now: float64, seconds since the last ones of each sequence that had some."""
        seen_at = self._slots.seen_at
        if isinstance(step, Decode):
            slots, gaps = step.slots, now - seen_at[step.slots]
            if np.isnan(gaps.sum()):  # some have ended, or were preempted, since the step was scheduled
                slots, gaps = slots[~np.isnan(gaps)], gaps[~np.isnan(gaps)]
            seen_at[slots] = now
            return gaps
        gaps = self.saw_step(step.decode, now) if step.decode else np.empty(0)
        sampled = [chunk.request for chunk in step.chunks if chunk.samples and chunk.request.slot >= 0]
        seen_at[[request.slot for request in sampled]] = now
        resumed = [now - request.seen_at for request in sampled if request.seen_at is not None]
        return np.concatenate([gaps, resumed])

    def schedule(self) -> Prefill | Decode | None:
        """The next step, or None while nothing can run. The scheduler's state then stands as after that step."""
        if self._mixed and not self._lacked_pages:
            return self._share()
        self._lacked_pages = False
        step: Prefill | Decode | None = None
        if not self._prefilled_last:
            step = self._prefill() or self._decode()
        else:
            step = self._decode() or self._prefill()
        self._prefilled_last = isinstance(step, Prefill)
        return step

    def _share(self) -> Prefill | Decode | None:
        """A step of both, if there is work for both."""
        decode = self._decode()
        if decode and decode.steps > 1:  # nothing waited
            return decode
        prefill = self._prefill(decode)
        return dataclasses.replace(prefill, decode=decode) if prefill else decode

    # Prefill

    def _prefill(self, beside: Decode | None = None) -> Prefill | None:
        """The next prompts' chunks, in a step of their own or `beside` a decode step, of which none loses its pages."""
        if not self._prefilling and not self._num_waiting:
            return None
        chunks: list[Chunk] = []
        positions = beside.positions if beside else self._slots.positions[self._slots.decoding]
        budget = self._prefill_budget(positions, max((r.num_computed for r in self._prefilling), default=0))
        unfinished = (request for request in list(self._prefilling) if request.state is State.RUNNING)
        while budget and len(chunks) < self._max_prefill_seqs and not self._lacked_pages:
            request, first = next(unfinished, None), False
            if request is None:
                request, first = self._admit(), True
            if request is None:
                break
            chunk = self._take_chunk(request, budget, first, may_preempt=beside is None)
            if chunk:
                chunks.append(chunk)
                budget -= chunk.count
        return Prefill(chunks) if chunks else None

    def _take_chunk(self, request: Request, budget: int, first: bool, *, may_preempt: bool) -> Chunk | None:
        """The next part of a sequence; None if there are no pages for it, or it had to give way to those before it."""
        start, known = request.num_computed, request.num_known
        count = min(budget, known - start)
        if not first:
            # Its pages were taken when it was admitted, but for layers with a window. Whoever gives way comes later in
            # the order of service, and so is in none of this step's chunks.
            self._tables.slide(request, start)
            missing = self._tables.missing(request, start + count)
            if not may_preempt and self._tables.pool.num_available < missing:
                self._lacked_pages = True
                return None
            if not self._make_room(request, missing):
                return None
            self._tables.extend(request, start + count)
        request.num_computed = start + count
        # Steps run in order, so whoever is scheduled from now on may read these pages, in this very step too.
        self._tables.name(request, request.num_computed, start // self._page_size)
        if samples := start + count == known:
            self._prefilling.remove(request)
            slots, slot = self._slots, request.slot
            slots.decoding[slot] = True
            slots.positions[slot] = known
            slots.room[slot] = len(request.pages[0]) * self._page_size
            slots.left[slot] = request.max_tokens - len(request.output_token_ids) - 1
            slots.needs[slot] = request.needs
            slots.unseen[slot] = bool(request.needs & Needs.MASK)
        return Chunk(request, start, count, first, samples)

    def _admit(self) -> Request | None:
        while self._waiting and self._waiting[0][2].state is not State.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._free_slots:
            return None
        request = self._waiting[0][2]
        known = request.num_known
        if known < request.num_sampled:  # a token of its own is still on its way from the device
            return None
        # A page in reserve for each running sequence keeps the newcomer from being preempted at once.
        if not self._tables.admit(request, reserve=self.num_running):
            return None
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        if request.cache_salt is not None:
            self.prefix_cache_queries += known
            self.prefix_cache_hits += request.num_computed
        if not request.output_token_ids:
            request.num_cached = request.num_computed
        request.slot = self._free_slots.pop()
        request.state = State.RUNNING
        self._slots.requests[request.slot] = request
        self._prefilling.append(request)
        self._prefilling.sort(key=lambda r: r.order)
        return request

    # Decode

    def _decode(self) -> Decode | None:
        slots = self._slots
        rows = np.flatnonzero(slots.decoding & (slots.left > 0) & ~slots.unseen).astype(np.int32)
        if not len(rows):
            return None
        needs = int(np.bitwise_or.reduce(slots.needs[rows]))
        waits = self._prefilling or self._num_waiting or needs & (Needs.LOGPROBS | Needs.MASK)
        steps = 1 if waits else min(self._decode_steps(len(rows)), self._page_size, int(slots.left[rows].max()))
        rows, new_pages = self._grow(rows, steps)
        if not len(rows):
            return None
        counts = np.minimum(slots.left[rows], steps)
        requests = [request for slot in rows.tolist() if (request := slots.requests[slot]) is not None]
        step = Decode(requests, rows, slots.positions[rows], counts, new_pages, steps, needs)
        slots.positions[rows] += counts
        slots.left[rows] -= counts
        slots.unseen[rows] = slots.needs[rows] & Needs.MASK != 0
        return step

    def _grow(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of `rows` that have pages for their next `steps` tokens, and the pages that they got for it."""
        slots = self._slots
        needed = slots.positions[rows] + np.minimum(slots.left[rows], steps)
        opened: dict[int, list[int]] = {}  # by slot
        short = [request for slot in rows[needed > slots.room[rows]] if (request := slots.requests[slot]) is not None]
        for request in sorted(short, key=lambda r: r.order):
            if request.state is not State.RUNNING:  # preempted for another
                continue
            slot = request.slot
            self._tables.slide(request, int(slots.positions[slot]))
            if not self._make_room(request, self._tables.pages_to_grow):
                continue
            slots.room[slot] += self._page_size
            self._tables.extend(request, int(slots.room[slot]))
            opened[slot] = [row[-1] for row in request.pages]
        rows = rows[slots.decoding[rows]]
        new_pages = np.full((self._tables.pages_to_grow, len(slots.requests)), -1, np.int32)
        for slot, pages in opened.items():
            new_pages[:, slot] = pages
        return rows, new_pages[:, rows]

    def _make_room(self, request: Request, pages: int) -> bool:
        """Preempt until so many pages are available. False if `request` itself had to go."""
        while self._tables.pool.num_available < pages:
            victim = max((r for r in self._slots.requests if r is not None), key=lambda r: r.order)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        slot = request.slot
        request.num_sampled = int(self._slots.positions[slot]) + 1 if self._slots.decoding[slot] else 0
        if not np.isnan(self._slots.seen_at[slot]):
            request.seen_at = float(self._slots.seen_at[slot])
        self._release(request)
        request.num_computed = 0
        self.num_preemptions += 1
        self.add(request)

    def _release(self, request: Request) -> None:
        slots, slot = self._slots, request.slot
        if slots.decoding[slot]:
            request.num_computed = int(slots.positions[slot])
        else:
            self._prefilling.remove(request)
        self._tables.release(request, request.num_computed)
        self._free_slots.append(slot)
        slots.requests[slot], slots.decoding[slot], slots.seen_at[slot] = None, False, np.nan
        request.slot = -1
