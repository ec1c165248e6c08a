"""How long steps take, and what follows for the size of the next one."""

from jaxserve.runner.buckets import Buckets

_NEW = 0.2  # share of the newest measurement in an estimate


class Pace:
    """Learns the seconds of a prefill step and of a decode step's token from the steps that have run, by bucket.

    `max_itl` bounds the seconds between two tokens of a running sequence, which a prefill step may come between;
    `burst` the seconds of a decode step of several tokens.
    """

    def __init__(self, buckets: Buckets, *, max_decode_steps: int, max_itl: float | None, burst: float):
        self._buckets = buckets
        self._max_itl, self._burst, self._max_decode_steps = max_itl, burst, max_decode_steps
        self._prefill: dict[int, float] = {}  # seconds by the bucket's tokens
        self._decode: dict[int, float] = {}  # seconds for each token by the bucket's rows

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A step of a bucket of so many tokens took so long."""
        before = self._prefill.get(tokens, seconds)
        self._prefill[tokens] = before + _NEW * (seconds - before)

    def observe_decode(self, rows: int, steps: int, seconds: float) -> None:
        """A step of `steps` tokens for each row of a bucket took so long."""
        before = self._decode.get(rows, seconds / steps)
        self._decode[rows] = before + _NEW * (seconds / steps - before)

    def prefill_budget(self, sequences: int) -> int:
        """The most tokens of the next prefill step while `sequences` wait for their next token.

        The largest bucket that is estimated to fit; the smallest one always runs, or prompts would wait for ever.
        """
        sizes = [bucket.tokens for bucket in self._buckets.prefill]
        if self._max_itl is None or not sequences:
            return sizes[-1]
        room = self._max_itl - self._decode.get(self._buckets.decode_for(sequences), 0.0)
        fitting = [size for size in sizes if self._prefill_seconds(size) <= room]
        return max(fitting, default=sizes[0])

    def decode_steps(self, sequences: int) -> int:
        """Tokens that a decode step may bring each of `sequences` while nothing waits."""
        seconds = self._decode.get(self._buckets.decode_for(sequences))
        if seconds is None:
            return 1
        return max(1, min(self._max_decode_steps, int(self._burst / seconds)))

    def _prefill_seconds(self, tokens: int) -> float:
        """Measured, or from the largest smaller bucket that was, as if half of its time grew with the tokens."""
        measured = [size for size in self._prefill if size <= tokens]
        if not measured:
            return 0.0 if tokens == self._buckets.prefill[0].tokens else float("inf")
        nearest = max(measured)
        return self._prefill[nearest] * (1 + tokens / nearest) / 2
