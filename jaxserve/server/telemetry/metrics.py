"""`/metrics`: what Prometheus scrapes. Names, labels and buckets are vLLM's, so that what reads those reads these."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxserve.outputs import RequestMetrics
from jaxserve.server.core.messages import Ready
from jaxserve.server.telemetry.engine import ENGINE, LABELS, EngineCollector
from jaxserve.server.telemetry.record import ABORTED, FAILED, RequestRecord
from jaxserve.stats import TOKEN_SECONDS, EngineStats

_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FINISH_REASONS = ("stop", "length", ABORTED, FAILED)
_REFUSALS = (  # that are told from the start, so that the first of them shows as an increase
    *("max_queued_requests", "max_queued_tokens", "max_requests_per_key", "queue_timeout", "request_timeout"),
    *("shutting_down", "engine_failed", "grammar_failed"),
)
MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})
OTHER = "other"  # routes and methods that clients make up, which are not to fill the memory


class Metrics:
    """The metrics of one server in a registry of their own; an `Observer` of its requests.

    Each completion counts as a request, as it does in vLLM. `routes` are the paths of the application's endpoints.
    """

    def __init__(self, ready: Ready, model_name: str):
        disable_created_metrics()  # when each was made, a line beside every histogram and counter
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self._engine = EngineCollector(model_name, ready.config)
        self._engine_seen_at = float("nan")
        self.routes: Mapping[Any, str] = {}
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)
        ProcessCollector("jaxserve_engine", lambda: ready.pid, registry=self.registry)

        powers = _powers(ready.config.max_model_len)
        self._first_token = self._histogram("time_to_first_token_seconds", _FIRST_TOKEN_SECONDS, "To the first token.")
        self._whole = self._histogram("e2e_request_latency_seconds", _REQUEST_SECONDS, "From arrival to end.")
        self._queued = self._histogram("request_queue_time_seconds", _REQUEST_SECONDS, "Until the first step began.")
        self._prefill = self._histogram(
            "request_prefill_time_seconds", _REQUEST_SECONDS, "From the first step's beginning to the first token."
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", _REQUEST_SECONDS, "From the first token to the last."
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", _REQUEST_SECONDS, "From the first step's beginning to the last token."
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", TOKEN_SECONDS, "For each token after the first, on average."
        )
        self._prompt_tokens = self._histogram("request_prompt_tokens", powers, "Tokens of the prompt.")
        self._computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", powers, "Tokens of the prompt that the prefix cache did not have."
        )
        self._tokens = self._histogram("request_generation_tokens", powers, "Tokens of the completion.")
        self._most_tokens = self._histogram(
            "request_max_num_generation_tokens", powers, "Tokens of the longest of a prompt's completions."
        )
        self._n = self._histogram("request_params_n", (1, 2, 5, 10, 20), "Completions that were asked for.")
        self._max_tokens = self._histogram(
            "request_params_max_tokens", powers, "Tokens that the completion might have had."
        )
        ended = self._counter("vllm:request_success", "Completions that ended, by why.", *LABELS, "finished_reason")
        self._ended = {reason: ended.labels(*self._labels.values(), reason) for reason in _FINISH_REASONS}

        self._refused = self._counter(
            "jaxserve:requests_refused", "Requests that were not served, by the setting that forbade it.", "reason"
        )
        for reason in _REFUSALS:
            self._refused.labels(reason)
        self._http = self._counter("jaxserve:http_requests", "Responses, by route.", "route", "method", "status")
        self._age = Gauge(
            "jaxserve:engine_stats_age_seconds",
            "Seconds since the engine gave the numbers that are shown here.",
            registry=self.registry,
        )
        self._age.set_function(lambda: time.monotonic() - self._engine_seen_at)
        tasks = Gauge("jaxserve:tasks", "Tasks of the server's event loop.", registry=self.registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))

    def engine_is(self, stats: EngineStats) -> None:
        """Where the engine stands now."""
        self._engine.stats, self._engine_seen_at = stats, time.monotonic()

    def responded(self, endpoint: Any, method: str, status: int) -> None:
        """A response has been sent, to its end or not."""
        route = self.routes.get(endpoint, OTHER)
        self._http.labels(route, method if method in _METHODS else OTHER, str(status)).inc()

    async def text(self) -> bytes:
        """All metrics in Prometheus' text format. That takes milliseconds; others have their turn after each metric."""
        parts = []
        for metric in self.registry.collect():
            parts.append(generate_latest(_Alone(metric)))
            await asyncio.sleep(0)
        return b"".join(parts)

    # As an observer

    def first_token(self, record: RequestRecord) -> None:
        if record.first_token_time is not None:
            self._first_token.observe(record.first_token_time - record.arrival_time)

    def ended(self, record: RequestRecord) -> None:
        for reason in record.finish_reasons:
            self._ended[reason or ABORTED].inc()
        if metrics := record.metrics:  # all have ended by themselves
            self._n.observe(record.params.n)
            self._most_tokens.observe(max(record.tokens))
            for tokens, end in zip(record.tokens, record.last_token_times, strict=True):
                self._observe(record, metrics, tokens, end)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def _observe(self, record: RequestRecord, metrics: RequestMetrics, tokens: int, end: float) -> None:
        """A completion of so many tokens, the last of which came at `end`."""
        self._whole.observe(end - record.arrival_time)
        self._prompt_tokens.observe(record.prompt_tokens)
        self._computed_tokens.observe(record.prompt_tokens - metrics.num_cached_tokens)
        self._tokens.observe(tokens)
        self._max_tokens.observe(record.max_tokens)
        begun, first, finished = metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time
        if begun is None or first is None or finished is None:
            raise ValueError(f"request {record.request_id} has ended before it began")
        last = max(first, min(end, finished))  # it was under way for a moment
        self._queued.observe(begun - metrics.arrival_time)
        self._prefill.observe(first - begun)
        self._decode.observe(last - first)
        self._inference.observe(last - begun)
        if tokens > 1:
            self._per_token.observe((last - first) / (tokens - 1))

    def _histogram(self, name: str, bounds: tuple[float, ...], help: str) -> Histogram:
        made = Histogram(f"vllm:{name}", help, self._labels, buckets=bounds, registry=self.registry)
        return made.labels(**self._labels)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)


class _Alone(Collector):
    def __init__(self, metric: Metric):
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def _powers(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    return tuple(
        bound for exponent in range(len(str(most))) for digit in (1, 2, 5) if (bound := digit * 10**exponent) <= most
    )
