"""Where an engine stands, in numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """One look at an engine between two steps. What begins with `total_` only ever grows.

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
        total_generated_tokens: tokens of completions.
        total_prefix_cache_queries: tokens of admitted sequences that the prefix cache was asked for.
        total_prefix_cache_hits: how many of those it had.
        total_preemptions: times that a running sequence gave its pages back to be computed again.
        total_compilations: programs that were compiled in the engine's process since start-up; more than none means
            that a step had to wait for the compiler.
    """

    seconds: float
    running: int
    waiting: int
    max_running: int
    pages_held: int
    pages_cached: int
    pages_free: int
    total_prompt_tokens: int
    total_generated_tokens: int
    total_prefix_cache_queries: int
    total_prefix_cache_hits: int
    total_preemptions: int
    total_compilations: int
