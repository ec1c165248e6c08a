"""Spans, as a collector of OpenTelemetry's gets them over HTTP."""

import contextlib
import http.server
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.testclient import TestClient

from jaxserve import InputError
from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from tests.server.cases import MODEL_NAME
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """What came, and the attributes of its spans."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def spans(self) -> list[Span]:
        resources = [resource for request in self.requests for resource in request.resource_spans]
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    found = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found, f"http://127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def traced(endpoint: str, fake: FakeEngine) -> Iterator[TestClient]:
    """A client of a server that has sent all spans when this is left."""
    config = ServerConfig(otlp_traces_endpoint=endpoint)
    with core_thread(fake) as core, TestClient(build_app(core.client, MODEL_NAME, config)) as client:
        yield client


def attributes(span: Span) -> dict[str, Any]:
    def value(given: Any) -> Any:
        kind = given.WhichOneof("value")
        found = getattr(given, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {attribute.key: value(attribute.value) for attribute in span.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_vllms_attributes_and_its_times(
    collector: tuple[Collector, str], stream: bool
) -> None:
    found, endpoint = collector
    fake = FakeEngine()
    fake.seconds_per_step = 0.01
    body = {"prompt": "Hello", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stream": stream, "request_id": "me"}
    start = time.time_ns()
    with traced(endpoint, fake) as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    (span,) = found.spans
    assert (span.name, span.kind) == ("llm_request", Span.SPAN_KIND_SERVER)
    told = attributes(span)
    times = {name: told.pop(name) for name in list(told) if name.startswith("gen_ai.latency.")}
    assert told == {
        "gen_ai.request.id": "cmpl-me-0",
        "gen_ai.response.model": MODEL_NAME,
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.prompt_tokens": 1,
        "gen_ai.usage.completion_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }
    first, end = times["gen_ai.latency.time_to_first_token"], times["gen_ai.latency.e2e"]
    decode, prefill = times["gen_ai.latency.time_in_model_decode"], times["gen_ai.latency.time_in_model_prefill"]
    assert decode >= 4 * fake.seconds_per_step
    assert times["gen_ai.latency.time_in_model_inference"] == pytest.approx(prefill + decode)
    assert 0 <= times["gen_ai.latency.time_in_queue"] <= first <= end - decode + 0.1
    # The events are where those times say, on the wall's clock.
    assert [event.name for event in span.events] == ["scheduled", "first_token"]
    assert start <= span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.events[1].time_unix_nano
    assert span.events[1].time_unix_nano - span.start_time_unix_nano == pytest.approx(first * 1e9, abs=1e3)
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(end * 1e9, abs=1e3)
    assert span.end_time_unix_nano <= time.time_ns()


def test_a_span_belongs_to_the_trace_that_the_client_names(collector: tuple[Collector, str]) -> None:
    found, endpoint = collector
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=7"}
    with traced(endpoint, FakeEngine()) as client:
        client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2}, headers=headers)
        client.post("/v1/completions", json={"prompt": "c", "max_tokens": 2})
        client.post("/v1/completions", json={"prompt": "d", "max_tokens": 2}, headers={"traceparent": "00-nonsense"})
    *both, alone, malformed = found.spans
    assert len(both) == 2  # one for each prompt
    for span in both:
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=7")
    for span in (alone, malformed):
        assert span.trace_id.hex() != TRACE
        assert not span.parent_span_id


def test_what_a_parent_does_not_sample_is_not_sent(collector: tuple[Collector, str]) -> None:
    found, endpoint = collector
    with traced(endpoint, FakeEngine()) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers)
    assert not found.spans


def test_a_request_that_the_engine_fails_is_an_error_and_has_a_span(collector: tuple[Collector, str]) -> None:
    found, endpoint = collector
    fake = FakeEngine()
    fake.error = RuntimeError("broken")
    with traced(endpoint, fake) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code >= 500
    (span,) = found.spans
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span)["gen_ai.response.finish_reasons"] == ["error"]
    assert "gen_ai.latency.time_to_first_token" not in attributes(span)
    assert not span.events


def test_a_collector_that_is_not_there_costs_no_request_and_delays_no_end() -> None:
    with traced("http://127.0.0.1:9/v1/traces", FakeEngine()) as client:
        for _ in range(3):
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        start = time.monotonic()
    assert time.monotonic() - start < 10


def test_a_missing_extra_and_a_wrong_url_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="otlp_traces_endpoint is 'localhost:4317'; give a URL of OTLP over HTTP"):
        ServerConfig(otlp_traces_endpoint="localhost:4317")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"OpenTelemetry is not installed .*; pip install 'jaxserve\[otel\]'"):
        ServerConfig(otlp_traces_endpoint="http://localhost:4318/v1/traces")
