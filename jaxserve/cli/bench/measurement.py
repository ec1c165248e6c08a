"""From requests' and steps' times to the numbers of a benchmark."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxserve.engine.meter import positions_read
from jaxserve.outputs import RequestOutput
from jaxserve.runner.step_batch import DecodeArrays, StepBatch

PERCENTILES = {"median": 50, "p95": 95, "p99": 99}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the engine. `seconds` is the time since the step before it was done, or since the run began."""

    decode: bool
    seconds: float
    rows: int  # sequences
    tokens: int  # computed
    positions_read: float  # whose keys and values a decode step's rows attend to, each row's own counted; of a layer
    repeats: int = 1  # times that the model ran: tokens of each row in a decode step


class StepRecorder:
    """An engine's `on_step`. Steps run one after the other, so that their times add up to the run's.

    `windows` are those of the model's layers.
    """

    def __init__(self, windows: Sequence[int | None] = (None,)) -> None:
        self.steps: list[Step] = []
        self._windows = windows
        self._since = 0.0

    def begin(self) -> None:
        """The run, or its next part, begins."""
        self._since = time.perf_counter()

    def __call__(self, batch: StepBatch) -> None:
        now = time.perf_counter()
        decode = isinstance(batch.arrays, DecodeArrays)
        arrays = batch.arrays
        positions = arrays.positions[arrays.positions >= 0]  # the others are padding
        tokens, read, repeats = len(positions), 0.0, 1
        if isinstance(arrays, DecodeArrays):
            counts = arrays.counts[: len(positions)]
            tokens, repeats = int(counts.sum()), int(arrays.steps)
            read = positions_read(positions, counts, self._windows)
        self.steps.append(Step(decode, now - self._since, batch.num_rows, tokens, read, repeats))
        self._since = now


def summary(values: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    sample = np.asarray(list(values))
    if not sample.size:
        return None
    return {"mean": float(sample.mean())} | {name: float(np.percentile(sample, q)) for name, q in PERCENTILES.items()}


def seconds_per_token(output: RequestOutput) -> float | None:
    """How long each token after the first took a finished request, on average; None if there were none."""
    first, end = _first_token_and_end(output)
    tokens = len(output.outputs[0].token_ids)
    return (end - first) / (tokens - 1) if tokens > 1 else None


def request_times(outputs: Sequence[RequestOutput]) -> dict[str, dict[str, float] | None]:
    """Seconds of finished requests: to the first token, for each token after it, and from arrival to end."""
    times = [(output.metrics.arrival_time, *_first_token_and_end(output)) for output in outputs]
    return {
        "ttft_seconds": summary(first - arrival for arrival, first, _ in times),
        "tpot_seconds": summary(each for output in outputs if (each := seconds_per_token(output)) is not None),
        "end_to_end_seconds": summary(end - arrival for arrival, _, end in times),
    }


def _first_token_and_end(output: RequestOutput) -> tuple[float, float]:
    metrics = output.metrics
    if metrics.first_token_time is None or metrics.finished_time is None:
        raise ValueError(f"request {output.request_id} has not finished")
    return metrics.first_token_time, metrics.finished_time


def token_rates(outputs: Sequence[RequestOutput], seconds: float) -> dict[str, float]:
    """Counts over all requests, and what a second of the run did of them."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return rates(len(outputs), prompt, sum(len(output.outputs[0].token_ids) for output in outputs), seconds)


def rates(requests: int, prompt_tokens: int, output_tokens: int, seconds: float) -> dict[str, float]:
    """The counts of a run, and what a second of it did of them."""
    return {
        "run_seconds": seconds,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_second": requests / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
    }


def step_times(steps: Sequence[Step]) -> dict[str, Any]:
    """Prefill and decode steps apart."""
    prefill, decode = [s for s in steps if not s.decode], [s for s in steps if s.decode]
    return {
        name: {
            "steps": len(of_kind),
            "seconds": sum(s.seconds for s in of_kind),
            "step_seconds": summary(s.seconds for s in of_kind),
            "passes": sum(s.repeats for s in of_kind),  # over the model
            "mean_rows": sum(s.tokens if s.decode else s.rows for s in of_kind) / sum(s.repeats for s in of_kind)
            if of_kind
            else None,  # sequences in a pass
            "tokens": sum(s.tokens for s in of_kind),
        }
        for name, of_kind in (("prefill", prefill), ("decode", decode))
    }
