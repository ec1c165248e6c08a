"""Where an engine stands, in numbers."""

import bisect
import dataclasses
import functools

import numpy as np

STEP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
# vLLM's, so that histograms of both can be added up.
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


@dataclasses.dataclass
class Histogram:
    """How many values lay at or below each bound and above the one before; the last count is of what lay above all."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> "Histogram":
        """One of no values."""
        return cls(bounds, [0] * (len(bounds) + 1), 0.0)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: np.ndarray) -> None:
        found = np.bincount(_array(self.bounds).searchsorted(values), minlength=len(self.counts)).tolist()
        self.counts = [before + new for before, new in zip(self.counts, found, strict=True)]
        self.sum += float(values.sum())

    def copy(self) -> "Histogram":
        return Histogram(self.bounds, [*self.counts], self.sum)


@functools.cache
def _array(bounds: tuple[float, ...]) -> np.ndarray:
    return np.array(bounds)


@dataclasses.dataclass
class HostSeconds:
    """Where the engine's thread has spent its time, over all steps."""

    schedule: float = 0.0
    pack: float = 0.0  # the batch's arrays
    dispatch: float = 0.0
    wait: float = 0.0  # for the device, and for what comes back from it
    take: float = 0.0  # tokens, text and what callers are given


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """One look at an engine between two steps. What begins with `total_`, and every histogram, only ever grows.

    A rate is the difference of two looks at a total over the difference of their `seconds`.

    Attributes:
        seconds: of the engine's clock at this look; only differences mean something.
        running: sequences that hold a slot.
        waiting: sequences in the queue.
        max_running: slots, and so the most sequences that run at the same time.
        pages_held: pages of running sequences.
        pages_cached: pages that only the prefix cache holds: taken when no other page is free.
        pages_free: pages with nothing in them.
        total_prompt_tokens: tokens that prefill steps have computed; what the prefix cache has is not among them, and
            what is computed again after a preemption is.
        total_begun_prompt_tokens: tokens of the prompts of sequences that have got so far as their first token.
        total_begun_cached_tokens: how many of these the prefix cache spared them.
        total_generated_tokens: tokens of completions.
        total_prefix_cache_queries: tokens of admitted sequences that the prefix cache was asked for.
        total_prefix_cache_hits: how many of those it had.
        total_preemptions: times that a running sequence gave its pages back to be computed again.
        total_compilations: programs that were compiled in the engine's process since start-up; more than none means
            that a step had to wait for the compiler.
        total_decode_bytes: of all weights, also of experts that no row used, once for each time that the model ran in a
            decode step, and of the keys and values that each row attended to.
        total_host_seconds: where the time of the engine's thread went.
        prefill_seconds: how long the device had each prefill step.
        decode_seconds: how long it had each decode step, which may bring each sequence several tokens.
        step_tokens: tokens that each step computed or, of a decode step, may have brought.
        token_seconds: how long each running sequence waited for the tokens that a decode step brought it, since those
            before.
    """

    seconds: float
    running: int
    waiting: int
    max_running: int
    pages_held: int
    pages_cached: int
    pages_free: int
    total_prompt_tokens: int
    total_begun_prompt_tokens: int
    total_begun_cached_tokens: int
    total_generated_tokens: int
    total_prefix_cache_queries: int
    total_prefix_cache_hits: int
    total_preemptions: int
    total_compilations: int
    total_decode_bytes: int
    total_host_seconds: HostSeconds
    prefill_seconds: Histogram
    decode_seconds: Histogram
    step_tokens: Histogram
    token_seconds: Histogram
