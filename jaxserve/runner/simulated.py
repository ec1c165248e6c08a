"""A runner without a device: it answers any batch after the time that a cost model says, on a clock of its own."""

import dataclasses
from typing import Any

import numpy as np

from jaxserve.runner.step_batch import DecodeArrays, StepBatch, StepResult


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Seconds of a step: a fixed part for each pass over the weights, and what grows with the work.

    The default costs nothing, which leaves the host's own time to be measured.
    """

    per_pass: float = 0.0
    per_prefill_token: float = 0.0
    per_decode_row: float = 0.0
    per_position_read: float = 0.0  # by a decode row, of keys and values

    def seconds(self, batch: StepBatch) -> float:
        arrays = batch.arrays
        positions = arrays.positions[arrays.positions >= 0]
        if not isinstance(arrays, DecodeArrays):
            return self.per_pass + self.per_prefill_token * len(positions)
        rows = float(arrays.counts.sum())
        read = float((arrays.counts[: len(positions)] * (positions + 1)).sum())
        return self.per_pass * int(arrays.steps) + self.per_decode_row * rows + self.per_position_read * read


class SimulatedRunner:
    """The contract of `Runner`, on a virtual clock: `clock()` is the time, `wait_until` lets it pass.

    Steps run one after the other; `collect` lets the time pass until its step is done. Every sampled token is
    `token_id`, so a request ends at its length, or at once where that is a stop token.
    """

    def __init__(self, cost: CostModel, *, max_decode_steps: int, token_id: int = 0):
        self._cost, self._max_decode_steps, self._token_id = cost, max_decode_steps, token_id
        self._now = self._busy_until = 0.0

    weight_bytes_per_step = kv_bytes_per_token = 0

    def clock(self) -> float:
        return self._now

    def wait_until(self, time: float) -> None:
        self._now = max(self._now, time)

    def dispatch(self, batch: StepBatch) -> StepResult:
        self._busy_until = max(self._now, self._busy_until) + self._cost.seconds(batch)
        rows = len(batch.arrays.slots)
        shape = (self._max_decode_steps, rows) if isinstance(batch.arrays, DecodeArrays) else rows
        return StepResult(_Due(self._busy_until, np.full(shape, self._token_id, np.int32)), None, None, None)

    def collect(self, result: StepResult, needs: int) -> StepResult:
        due: _Due = result.token_ids
        self.wait_until(due.time)
        return result._replace(token_ids=due.token_ids)

    def close(self) -> None:
        """Nothing is held."""


@dataclasses.dataclass(frozen=True)
class _Due:
    time: float
    token_ids: Any  # int32, as in `StepResult`
