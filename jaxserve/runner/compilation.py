"""Compiling programs ahead of time, and counting what is compiled at any time."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompilationCounter:
    """How many programs XLA has compiled in this process, those `cached` included that it read from its cache.

    `loaded` counts those that came compiled from the program cache, besides. One instance: `compilations`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.cached = 0
        self.loaded = 0
        self._lock = threading.Lock()
        self._this_thread = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def cached_here(self) -> int:
        """How many programs the calling thread has got from XLA's cache."""
        return getattr(self._this_thread, "cached", 0)

    def note_loaded(self) -> None:
        with self._lock:
            self.loaded += 1

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == _CACHE_HIT_EVENT:
            with self._lock:
                self.cached += 1
            self._this_thread.cached = self.cached_here() + 1


compilations = CompilationCounter()


def compile_all(
    lowerings: Iterable[Callable[[], jax.stages.Compiled]], on_compiled: Callable[[int, int], None]
) -> list[jax.stages.Compiled]:
    """Run `lowerings` on as many threads as there are cores; `on_compiled` is told how many of how many are done.

    An error, of `on_compiled` too, ends it once the ones under way are done.
    """
    tasks = list(lowerings)
    done = 0
    lock = threading.Lock()

    def run(task: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        nonlocal done
        compiled = task()
        with lock:
            done += 1
            on_compiled(done, len(tasks))
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return list(pool.map(run, tasks))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
