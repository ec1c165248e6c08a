"""How long the device takes for something, without what the host takes to ask for it.

Two ways, both with wall-clock time around work that has been waited for:

`loop_seconds` puts hundreds of calls into one program, each fed with the result of the one before, so that the host
launches once. XLA knows the number of rounds, so it asks the device for nothing in between; a call must not branch on
what the device alone knows. One round costs some microseconds beside the call itself (a counter, a slice of a page
table); they are not taken off.

`queued_seconds` dispatches the same program again and again and waits for the last. The device never waits for the
host as long as one call takes longer than a dispatch: use it for work of more than half a millisecond.

Neither takes memory for granted that a real step would not find in the cache: the caller gives each call other data
until `COLD_BYTES` have gone by.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

COLD_BYTES = 256 * 2**20  # several times any GPU's L2 (60 MB on an H200)


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _repeats() -> int:
    return 3 if on_gpu() else 1


def loop_seconds(
    step: Callable[[jax.Array, Any, Any], Any], carry: Any, constants: Any, *, expected: float, most: int = 1000
) -> float:
    """Seconds of one `carry = step(round, carry, constants)` on the device; `carry` is donated.

    `expected` seconds decide how many rounds one measurement has: some 20 milliseconds' worth.
    """
    rounds = max(2, min(most, int(0.02 / expected))) if on_gpu() else 2

    @partial(jax.jit, donate_argnums=0)
    def loop(carry: Any, constants: Any) -> Any:
        return jax.lax.fori_loop(0, rounds, lambda index, carry: step(index, carry, constants), carry)

    carry = jax.block_until_ready(loop(carry, constants))  # compiles
    taken: list[float] = []
    while len(taken) < _repeats() and sum(taken) * rounds < 1:
        start = time.perf_counter()
        carry = jax.block_until_ready(loop(carry, constants))
        taken.append((time.perf_counter() - start) / rounds)
    return statistics.median(taken)


def queued_seconds(call: Callable[[], Any], *, total: float = 0.1) -> float:
    """Seconds of one `call()`, which dispatches and returns what it has started; about `total` seconds are queued."""
    jax.block_until_ready(call())  # compiles
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    count = max(2, min(200, int(total / once))) if on_gpu() else 2
    taken = []
    for _ in range(_repeats()):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - start) / count)
        if sum(taken) * count > 2:
            break
    return statistics.median(taken)
