"""What became of a request, for those who count and trace."""

import dataclasses
from typing import Protocol

from jaxserve.outputs import RequestMetrics, RequestOutput
from jaxserve.sampling_params import SamplingParams

ABORTED, FAILED = "abort", "error"  # beside the finish reasons of completions


@dataclasses.dataclass
class RequestRecord:
    """One prompt and its completions, as far as they have come.

    Times are in seconds of `time.perf_counter`, which is one clock for the server's process and the engine's.

    Attributes:
        arrival_time: when the server had read the request.
        first_token_time: when the first token of any completion came; of a request that does not stream, known at the
            end.
        metrics: the engine's own times, once all completions have ended.
        tokens: of each completion.
        finish_reasons: of each completion that ended, or has to count as ended; None for those that have not.
        last_token_times: when each completion's last token came.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    params: SamplingParams
    arrival_time: float
    first_token_time: float | None = None
    metrics: RequestMetrics | None = None
    tokens: list[int] = dataclasses.field(init=False)
    finish_reasons: list[str | None] = dataclasses.field(init=False)
    last_token_times: list[float] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [0] * self.params.n
        self.finish_reasons = [None] * self.params.n
        self.last_token_times = [self.arrival_time] * self.params.n

    def take(self, delta: RequestOutput, now: float) -> None:
        """Note what has come now."""
        for output in delta.outputs:
            self.tokens[output.index] += len(output.token_ids)
            self.last_token_times[output.index] = now
            if output.finish_reason is not None:
                self.finish_reasons[output.index] = output.finish_reason
        if delta.finished:
            self.metrics = delta.metrics
            self.end("stop")  # an embedding has no completion that would have a reason

    def end(self, reason: str) -> None:
        """What has not ended by itself ends now."""
        self.finish_reasons = [known or reason for known in self.finish_reasons]


class Observer(Protocol):
    """Is told of every request that the engine has been given, on the event loop."""

    def first_token(self, record: RequestRecord) -> None:
        """It has its first token."""

    def ended(self, record: RequestRecord) -> None:
        """Nothing more comes; each completion has its reason."""

    def refused(self, reason: str) -> None:
        """A request was not served, or not to its end; `reason` is the setting that forbade it, or what happened."""
