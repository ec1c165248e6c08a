"""What a caller gets back, in vLLM's shapes. msgspec's structs, since they go from process to process."""

from typing import Any

import msgspec


class Logprob(msgspec.Struct):
    """One token's log-probability, its rank in the vocabulary (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # of one position, by token id


class CompletionOutput(msgspec.Struct):
    """One completion, or what a step added to it.

    Once it ended, `finish_reason` is `"stop"` or `"length"`, or `"error"` if its grammar could not be followed any
    further; `stop_reason` then says why.
    """

    index: int
    text: str = ""
    token_ids: list[int] = []  # of its own: a struct copies its defaults
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    message: dict[str, Any] | None = None  # of a chat: the text as a message in OpenAI's shape

    def extend(self, delta: "CompletionOutput") -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + (delta.cumulative_logprob or 0.0)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """Points in time of a request, in seconds of `time.perf_counter`; None until reached."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0  # of the prompt, that the prefix cache spared the first completion
    first_scheduled_time: float | None = None


class RequestOutput(msgspec.Struct):
    """A request's completions so far, or, in a stream, what one step added to them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    prompt_logprobs: list[Logprobs | None] | None = None
    embedding: list[float] | None = None  # in place of completions, where one was asked for

    def extend(self, delta: "RequestOutput") -> None:
        """Take in a delta of the same request."""
        by_index = {output.index: output for output in self.outputs}
        for output in delta.outputs:
            if output.index in by_index:
                by_index[output.index].extend(output)
            else:
                self.outputs.append(output)
        self.outputs.sort(key=lambda output: output.index)
        self.finished = delta.finished
        self.metrics = delta.metrics
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.embedding is not None:
            self.embedding = delta.embedding


def add_delta(outputs: dict[str, RequestOutput], delta: RequestOutput) -> None:
    """Add `delta` to what `outputs` holds of its request, by request id."""
    if delta.request_id in outputs:
        outputs[delta.request_id].extend(delta)
    else:
        delta.outputs.sort(key=lambda output: output.index)
        outputs[delta.request_id] = delta
