"""What an engine counts while it runs: something for each step, and nothing for each of its sequences."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.engine.scheduler import Decode, Prefill
from jaxserve.stats import STEP_SECONDS, STEP_TOKENS, TOKEN_SECONDS, Histogram, HostSeconds


class Meter:
    """An engine's totals and histograms.

    `weight_bytes` is what a pass over the model reads of weights, `kv_bytes` what it reads of each position that it
    attends to, in all layers, whose windows are `windows`.
    """

    def __init__(self, *, weight_bytes: int, kv_bytes: int, windows: Sequence[int | None]):
        self._weight_bytes, self._kv_bytes, self._windows = weight_bytes, kv_bytes, windows
        self.generated_tokens = 0
        self.host_seconds = HostSeconds()
        self._prompt_tokens = self._begun_prompt_tokens = self._begun_cached_tokens = 0
        self._decode_bytes = 0.0
        self._prefill_seconds, self._decode_seconds = Histogram.of(STEP_SECONDS), Histogram.of(STEP_SECONDS)
        self._step_tokens, self._token_seconds = Histogram.of(STEP_TOKENS), Histogram.of(TOKEN_SECONDS)

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A sequence has got its first token; the prefix cache had so many of its prompt's."""
        self._begun_prompt_tokens += prompt_tokens
        self._begun_cached_tokens += cached_tokens

    def stepped(self, step: Prefill | Decode, seconds: float, waited: np.ndarray) -> None:
        """The device has had a step for so long, and its sequences waited so long for their tokens: float64 [any]."""
        if isinstance(step, Prefill):
            tokens = sum(chunk.count for chunk in step.chunks)
            self._prompt_tokens += tokens
            tokens += len(step.decode.slots) if step.decode else 0
            self._prefill_seconds.add(seconds)
        else:
            tokens = int(step.counts.sum())
            read = self._kv_bytes * positions_read(step.positions, step.counts, self._windows)
            self._decode_bytes += self._weight_bytes * step.steps + read
            self._decode_seconds.add(seconds)
        self._step_tokens.add(tokens)
        if len(waited):
            self._token_seconds.add_all(waited)

    def totals(self) -> dict[str, Any]:
        """Those fields of `EngineStats` that are counted here, as they are now."""
        return {
            "total_prompt_tokens": self._prompt_tokens,
            "total_begun_prompt_tokens": self._begun_prompt_tokens,
            "total_begun_cached_tokens": self._begun_cached_tokens,
            "total_generated_tokens": self.generated_tokens,
            "total_decode_bytes": int(self._decode_bytes),
            "total_host_seconds": dataclasses.replace(self.host_seconds),
            "prefill_seconds": self._prefill_seconds.copy(),
            "decode_seconds": self._decode_seconds.copy(),
            "step_tokens": self._step_tokens.copy(),
            "token_seconds": self._token_seconds.copy(),
        }


def positions_read(positions: np.ndarray, counts: np.ndarray, windows: Sequence[int | None]) -> float:
    """Positions that a decode step attends to, summed over its rows and their tokens, the mean of all layers.

    Row i goes from `positions[i]` on for `counts[i]` tokens, each of which attends to one position more. `windows` are
    the layers'.
    """
    read = 0.0
    for window in set(windows):
        # So many of a row's tokens attend to all positions, the first of them to positions[i] + 1; the others to these.
        whole = counts if window is None else np.clip(window - positions, 0, counts)
        found = np.sum(whole * (2 * positions + whole + 1), dtype=np.int64) / 2
        found += 0 if window is None else window * np.sum(counts - whole)
        read += found * windows.count(window) / len(windows)
    return float(read)
