"""How long steps take, and what follows for the size of the next one."""

import numpy as np

from jaxserve.runner.buckets import Buckets

_NEW = 0.2  # share of the newest measurement in an estimate
_LEAST_TOKENS = 8  # of prompts in a prefill step, however long it takes: they would wait for ever
_MARGIN = 0.05  # share of the bound that is left for what steps take more than estimated


class Pace:
    """Learns the seconds of a prefill step and of a decode step's token from the steps that have run, by bucket.

    `max_itl` bounds the seconds between two tokens of a running sequence, which a prefill step may come between;
    `burst` the seconds of a decode step of several tokens.
    """

    def __init__(self, buckets: Buckets, *, max_decode_steps: int, max_itl: float | None, burst: float):
        self._buckets = buckets
        self._max_itl, self._burst, self._max_decode_steps = max_itl, burst, max_decode_steps
        self._prefill = _PrefillSeconds([bucket.tokens for bucket in buckets.prefill])
        self._decode: dict[int, float] = {}  # seconds for each token by the bucket's rows

    def observe_prefill(self, tokens: int, attended: int, seconds: float) -> None:
        """A step of a bucket of so many tokens, which attended to so many positions together, took so long."""
        if self._max_itl is not None:  # else nobody asks
            self._prefill.observe(tokens, attended, seconds)

    def observe_decode(self, rows: int, steps: int, seconds: float) -> None:
        """A step of `steps` tokens for each row of a bucket took so long."""
        before = self._decode.get(rows, seconds / steps)
        self._decode[rows] = before + _NEW * (seconds / steps - before)

    def prefill_budget(self, positions: np.ndarray, depth: int) -> int:
        """The most prompts' tokens of the next prefill step, in which a prompt goes on at position `depth`, while
        sequences wait for their next token, whose newest are at `positions`.

        As many as are estimated to fit, and a few at least.
        """
        shared = len(positions) if self._buckets.mixed else 0  # tokens of the step that are not prompts'
        sizes = [bucket.tokens for bucket in self._buckets.prefill if bucket.tokens >= shared + _LEAST_TOKENS]
        if self._max_itl is None or not len(positions):
            return sizes[-1] - shared
        room = (1 - _MARGIN) * self._max_itl
        if not shared:
            room -= self._decode.get(self._buckets.decode_for(len(positions)), 0.0)
        attended = int(positions.sum()) if shared else 0
        fitting = [min(size - shared, self._prefill.fitting(size, room, attended, depth)) for size in sizes]
        return max(_LEAST_TOKENS, *fitting)

    def decode_steps(self, sequences: int) -> int:
        """Tokens that a decode step may bring each of `sequences` while nothing waits."""
        seconds = self._decode.get(self._buckets.decode_for(sequences))
        if seconds is None:
            return 1
        return max(1, min(self._max_decode_steps, int(self._burst / seconds)))


class _PrefillSeconds:
    """A prefill step's seconds: a part that goes with its bucket, and one with the positions that its tokens attend to.

    Both are estimated by a Kalman filter, which tells one from the other as prompts grow. Its state is the seconds of
    every bucket, and those of a million positions behind them.
    """

    _UNIT = 1e6  # positions
    _NOISE, _DRIFT = 0.1, 0.03  # standard deviations: of a measurement, and of what it measures from one to the next

    def __init__(self, sizes: list[int]):
        self._sizes = sizes
        self._known = np.zeros(len(sizes), bool)
        self._seconds = np.zeros(len(sizes) + 1)
        self._covariance = np.diag(np.full(len(sizes) + 1, 1e4))

    def observe(self, tokens: int, attended: int, seconds: float) -> None:
        bucket = self._sizes.index(tokens)
        self._known[bucket] = True
        moved = [bucket, -1]
        self._covariance[moved, moved] += (self._DRIFT * self._seconds[moved]) ** 2
        weights = np.zeros(len(self._seconds))
        weights[bucket], weights[-1] = 1, attended / self._UNIT
        correlated = self._covariance @ weights
        gain = correlated / (weights @ correlated + (self._NOISE * seconds) ** 2)
        self._seconds = np.maximum(self._seconds + gain * (seconds - weights @ self._seconds), 0)
        self._covariance -= np.outer(gain, correlated)

    def fitting(self, size: int, room: float, attended: int, depth: int) -> int:
        """How many tokens from position `depth` on a bucket's step may have to take no longer than `room`.

        `attended` are the positions that others in it attend to. A bucket that was not measured is taken to cost what
        the largest smaller one does, as if half of that grew with the tokens.
        """
        known = [index for index in np.flatnonzero(self._known) if self._sizes[index] <= size]
        if not known:
            return size if size == self._sizes[0] else 0
        nearest = known[-1]
        seconds = self._seconds[nearest] * (1 + size / self._sizes[nearest]) / 2
        position = self._seconds[-1] / self._UNIT
        left = room - seconds - attended * position
        if left < 0:
            return 0
        return int(min(size, left / max(position * (depth + size / 2), 1e-12)))
