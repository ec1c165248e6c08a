"""OpenTelemetry: a span for each request, under the name and with the attributes that vLLM gives it.

Imported on demand: OpenTelemetry is an extra.
"""

import threading
import time
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import jaxserve
from jaxserve.server import logs
from jaxserve.server.telemetry.record import FAILED, RequestRecord

_EXPORT_SECONDS = 5.0  # that the collector has to take a batch of spans
_LAST_SPANS_SECONDS = 5.0  # and, when the server ends, all that are left
_CONTEXT = TraceContextTextMapPropagator()


class Traces:
    """An `Observer` that sends a span `llm_request` for each request that ends, from a thread of its own.

    The span is a child of the one that the request's `traceparent` header names. What the collector at `endpoint`,
    OTLP over HTTP, does not take in time is dropped.
    """

    def __init__(self, endpoint: str, model_name: str):
        service = Resource({"service.name": "jaxserve", "service.version": jaxserve.__version__})
        # The SDK's own variables, OTEL_SERVICE_NAME among them, tell several servers apart.
        self._provider = TracerProvider(resource=service.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_SECONDS)))
        self._tracer = self._provider.get_tracer("jaxserve", jaxserve.__version__)
        self._model_name = model_name

    def close(self) -> None:
        """Send what is left, as far as there is time for it."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_LAST_SPANS_SECONDS)

    # As an observer

    def first_token(self, record: RequestRecord) -> None:
        pass

    def refused(self, reason: str) -> None:
        pass

    def ended(self, record: RequestRecord) -> None:
        now = time.perf_counter()
        epoch = time.time_ns() - int(now * 1e9)  # of `perf_counter`
        current = logs.current.get()
        span = self._tracer.start_span(
            "llm_request",
            context=_CONTEXT.extract(current.trace_headers if current else {}),
            kind=SpanKind.SERVER,
            attributes=self._attributes(record, now),
            start_time=epoch + int(record.arrival_time * 1e9),
        )
        begun = record.metrics.first_scheduled_time if record.metrics else None
        for name, at in (("scheduled", begun), ("first_token", record.first_token_time)):
            if at is not None:
                span.add_event(name, timestamp=epoch + int(at * 1e9))
        if FAILED in record.finish_reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(epoch + int(now * 1e9))

    def _attributes(self, record: RequestRecord, now: float) -> dict[str, Any]:
        params, metrics, arrival, first = record.params, record.metrics, record.arrival_time, record.first_token_time
        found = {
            "gen_ai.request.id": record.request_id,
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": record.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": record.prompt_tokens,
            "gen_ai.usage.completion_tokens": sum(record.tokens),
            "gen_ai.response.finish_reasons": [reason or "" for reason in record.finish_reasons],
            "gen_ai.latency.e2e": now - arrival,
        }
        if first is not None:
            found["gen_ai.latency.time_to_first_token"] = first - arrival
        if metrics and metrics.first_scheduled_time and metrics.first_token_time and metrics.finished_time:
            begun, first, end = metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time
            found |= {
                "gen_ai.latency.time_in_queue": begun - metrics.arrival_time,
                "gen_ai.latency.time_in_model_prefill": first - begun,
                "gen_ai.latency.time_in_model_decode": end - first,
                "gen_ai.latency.time_in_model_inference": end - begun,
            }
        return found
